"""Markdown tables."""

from ddt.tables import markdown_table


def test_columns_are_aligned_and_bars_escaped():
    assert markdown_table(["metric", "a|b"], [["fid", "3.2"], ["class_accuracy", "0.95"]]).splitlines() == [
        "| metric         | a\\|b |",
        "| -------------- | ---: |",
        "| fid            |  3.2 |",
        "| class_accuracy | 0.95 |",
    ]
    assert markdown_table(["", ""], [["kind", "DDT"]], align="ll").splitlines() == [
        "|      |     |",
        "| ---- | --- |",
        "| kind | DDT |",
    ]
