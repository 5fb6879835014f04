"""How tables are written."""

import re

import pytest

from trl_steer.eval.report import results
from trl_steer.eval.report.tables import Bold, Table, latex, markdown

TABLE = Table("t", "In %.", ["Model", "Row", "Δ"], [["A_1", "x|y", Bold("-1.0")], ["", "z", "+2.0†"], ["B", "*", "-"]])


def test_markdown_aligns_numbers_on_the_right_and_escapes_markup():
    assert TABLE.markdown().splitlines() == [
        "| Model | Row | Δ |",
        "| --- | --- | ---: |",
        r"| A\_1 | x\|y | **-1.0** |",
        "|  | z | +2.0† |",
        r"| B | \* | - |",
    ]


def test_latex_has_the_rules_of_booktabs_and_one_above_each_group():
    assert TABLE.latex().splitlines() == [
        r"\begin{table}[t]",
        r"\centering\small",
        r"\caption{In \%.}",
        r"\label{tab:t}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        r"\begin{tabular}{llr}",
        r"\toprule",
        r"Model & Row & $\Delta$ \\",
        r"\midrule",
        r"A\_1 & x\textbar{}y & \textbf{$-$1.0} \\",
        r" & z & $+$2.0$^\dagger$ \\",
        r"\midrule",
        r"B & $^*$ & - \\",
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]


@pytest.mark.parametrize("text", ["a & b", "50% of $2", "#1_{x}", r"C:\x", "~^", "a<b>c", "↑↓‡"])
def test_latex_has_no_character_that_means_something_else(text):
    plain = re.sub(r"\\[&%$#_{}]|\\\w+(\{\})?|\$[^$]*\$", "", latex(text))
    assert not set(plain) & set("&%$#_{}\\~^<>↑↓‡"), plain


def test_latex_keeps_hyphens_that_are_not_signs():
    assert latex("Joint-Orth 1-vec 2e-3 (-1.5)") == "Joint-Orth 1-vec 2e-3 ($-$1.5)"


def test_markdown_keeps_other_characters():
    assert markdown("r=8 (50%), 2e-3 & more") == "r=8 (50%), 2e-3 & more"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.004, "+0.4"), (-0.0199, "-2.0"), (0.0004, "0.0"), (-0.0004, "0.0"), (None, "-"), (float("inf"), "-")],
)
def test_differences_have_a_sign_unless_they_are_zero(value, expected):
    assert results.points(value) == expected


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([1.0], "100%"),
        ([0.0451], "4.5%"),
        ([0.00261], "0.26%"),
        ([0.000032], "0.0032%"),
        ([0.0021, 0.0021001], "0.21%"),
        ([0.001, 0.002], "0.1% to 0.2%"),
        ([], "-"),
    ],
)
def test_trainable_shares_are_in_percent(shares, expected):
    assert results.trainable(shares) == expected


@pytest.mark.parametrize(("value", "expected"), [(2e-3, "2e-3"), (1e-5, "1e-5"), (1.5e-3, "1.5e-3"), (0.5, "5e-1")])
def test_learning_rates_are_short(value, expected):
    assert results.rate(value) == expected
