"""The backward with what its inner loops do not need taken out of them: 16 bits, Hopper, nothing unusual in strides."""
