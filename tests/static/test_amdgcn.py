"""Reading AMD's machine code: the loop that matters, spills and resources."""

from trifast_inductor.static.amdgcn import parse

TEXT = """
	.text
kernel:                                 ; @kernel
.Lfunc_begin0:
; %bb.8:
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_exp_f32_e32 v1, v1
	s_cbranch_scc0 .LBB0_1
	s_cbranch_execz .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 104 5                         ; forward.py:104:5
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
	v_exp_f32_e32 v2, v3
	v_exp_f32_e32 v4, v5
	v_add_f32_e32 v6, v2, v4
.Ltmp170:
	s_cbranch_scc1 .LBB0_2
.LBB0_3:
	s_endpgm
    .private_segment_fixed_size: 12
    .sgpr_spill_count: 5
    .vgpr_count:     152
    .vgpr_spill_count: 3
"""


def test_the_innermost_loop_with_the_most_products_and_exponentials() -> None:
    code = parse(TEXT)
    names = [instruction.name for instruction in code.hot_loop]
    assert names == ["v_mfma_f32_32x32x8_bf16", "v_exp_f32_e32", "v_exp_f32_e32", "v_add_f32_e32", "s_cbranch_scc1"]
    assert code.exponentials == 2


def test_resources_and_spills() -> None:
    code = parse(TEXT)
    assert (code.registers, code.stack, code.spills) == (152, 12, 3)


def test_code_without_a_loop() -> None:
    assert parse("	s_endpgm").hot_loop == ()
