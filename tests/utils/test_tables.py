"""Tables as text."""

from dora_mm.utils.tables import markdown_table


def test_a_cell_with_the_mark_of_cells_stays_one():
    table = markdown_table(["rule", "modules"], [[r"attn\.(to_q|to_k)", "12"]])
    assert table.splitlines()[2] == r"| attn\.(to_q\|to_k) | 12 |"
