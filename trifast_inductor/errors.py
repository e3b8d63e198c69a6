"""Every exception that the package raises on purpose. Imports nothing of the project."""


class TrifastError(Exception):
    """Base of all errors of this package."""


class ShapeError(TrifastError, ValueError):
    """An argument has the wrong rank or a size that contradicts another argument."""


class DtypeError(TrifastError, TypeError):
    """An argument has a dtype that the op does not take, or one that differs from its partners'."""


class DeviceError(TrifastError, ValueError):
    """Arguments lie on different devices, or on one that has no implementation."""


class ScaleError(TrifastError, ValueError):
    """The scale is negative, NaN or infinite."""


class UnknownOptionError(TrifastError, ValueError):
    """An option of the backend that neither this package nor inductor knows."""


class DoubleBackwardError(TrifastError, NotImplementedError):
    """A gradient of a gradient was asked for; the fused op is differentiable once."""


class ForwardModeError(TrifastError, NotImplementedError):
    """A forward-mode derivative (jvp, jacfwd, forward_ad) was asked for; the fused op has reverse mode only."""


class DeclinedError(TrifastError, RuntimeError):
    """Under `strict=True`: something that looks like triangle attention was not rewritten."""


class FactoryError(TrifastError, ValueError):
    """What `explain` was asked to call does not give a model and its arguments."""


class MissingPackageError(TrifastError, ImportError):
    """An optional package that a command needs is not installed."""
