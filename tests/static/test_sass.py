"""Reading machine code: the loop that matters, spills and resources."""

from trifast_inductor.static.sass import parse

TEXT = """
Fatbin elf code:
 Function kernel:
  REG:130 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:712 TEXTURE:0 SURFACE:0 SAMPLER:0
	Function : kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
                                                                          /* 0x000fe20000000800 */
        /*0010*/                   MUFU.EX2 R4, R5 ;                      /* 0x00 */
        /*0020*/                   STL [R1], R4 ;                         /* 0x00 */
        /*0030*/                   SYNCS.PHASECHK R2, [UR4] ;             /* 0x00 */
        /*0040*/              @!P0 BRA 0x30 ;                             /* 0x00 */
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, R4 ;      /* 0x00 */
        /*0060*/                   MUFU.EX2 R6, R7 ;                      /* 0x00 */
        /*0070*/              @P1  MUFU.EX2 R8, R9 ;                      /* 0x00 */
        /*0080*/                   FFMA R3, R4, R5, R6 ;                  /* 0x00 */
        /*0090*/                   LDL R4, [R1] ;                         /* 0x00 */
        /*00a0*/              @P2  BRA 0x50 ;                             /* 0x00 */
        /*00b0*/                   HMMA.16816.F32 R4, R8, R2, R4 ;        /* 0x00 */
        /*00c0*/              @P3  BRA 0x50 ;                             /* 0x00 */
        /*00d0*/                   MUFU.EX2 R6, R7 ;                      /* 0x00 */
        /*00e0*/              @UP1 BRA 0xd0 ;                             /* 0x00 */
        /*00f0*/                   EXIT ;                                 /* 0x00 */
        /*0100*/                   BRA 0x100;                             /* 0x00 */
"""


def test_the_innermost_loop_with_the_most_products_and_exponentials() -> None:
    code = parse(TEXT)
    names = [instruction.name for instruction in code.hot_loop]
    assert names == ["HGMMA.64x32x16.F32.BF16", "MUFU.EX2", "MUFU.EX2", "FFMA", "LDL", "BRA"]
    assert code.exponentials == 2


def test_resources_and_spills() -> None:
    code = parse(TEXT)
    assert (code.registers, code.stack, code.spills) == (130, 16, 2)


def test_code_without_a_loop() -> None:
    assert parse("        /*0000*/                   EXIT ;  /* 0x00 */").hot_loop == ()
