"""Tables as text."""

from dora_mm.utils.tables import markdown_table


def test_a_pipe_in_a_cell_is_escaped():
    table = markdown_table(["rule", "modules"], [[r"attn\.(to_q|to_k)", "12"]])
    assert table.splitlines()[2] == r"| attn\.(to_q\|to_k) | 12 |"
