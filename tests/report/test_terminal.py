"""What the terminal shows: plots and lines by hand, and nothing of a model's output taken for a command."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

import pytest
from rich.console import Console

from gvpo.groups import Completion, Group
from gvpo.report.terminal import ProgressDisplay, completions_table, plain, plot, shorten


def console(*, terminal: bool = False, width: int = 200) -> tuple[Console, StringIO]:
    out = StringIO()
    return Console(file=out, force_terminal=terminal, width=width, color_system=None), out


def shown(groups: Sequence[Group], count: int, weights: Sequence[float] | None = None) -> list[list[str]]:
    """The cells of the table's rows."""
    to, out = console()
    to.print(completions_table(groups, count, weights))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


class TestPlot:
    def test_a_step_by_hand(self) -> None:
        assert plot([0, 1], width=2, height=2) == "1 ┤ ╭\n0 ┤─╯"

    def test_up_and_down_by_hand(self) -> None:
        assert plot([0, 0, 2, 0], width=4, height=3, title="reward") == (
            "reward\n"
            "2 ┤  ╭╮\n"
            "  │  ││\n"
            "0 ┤──╯╰"
        )  # fmt: skip

    def test_more_values_than_columns_are_averaged(self) -> None:
        # Means of (0, 2), (4, 6): 1 and 5.
        assert plot([0, 2, 4, 6], width=2, height=2) == "5 ┤ ╭\n1 ┤─╯"

    def test_fewer_values_than_columns_are_joined_by_straight_lines(self) -> None:
        # 0, 1, 2 at columns 0, 2, 4 of five: 0.5 and 1.5 between, on five rows the diagonal.
        assert plot([0, 1, 2], width=5, height=5) == "\n".join(["2 ┤    ╭", "  │   ╭╯", "  │  ╭╯", "  │ ╭╯", "0 ┤─╯"])

    @pytest.mark.parametrize("values", [[3.0], [3.0, 3.0, 3.0]])
    def test_a_constant_is_a_flat_line_with_one_label(self, values: list[float]) -> None:
        assert plot(values, width=4, height=2) == "  │\n3 ┤────"

    def test_labels_are_aligned(self) -> None:
        assert plot([-0.25, 10], width=2, height=2) == "   10 ┤ ╭\n-0.25 ┤─╯"

    def test_nothing_to_plot_is_said(self) -> None:
        assert plot([], title="reward") == "reward: no values"

    def test_the_size_holds_for_any_number_of_values(self) -> None:
        for count in range(1, 140, 7):
            lines = plot([float(n % 5) for n in range(count)], width=60, height=8).splitlines()
            assert len(lines) == 8
            axis = lines[-1].index("┤")
            assert max(len(line) for line in lines) == axis + 1 + 60


class TestPlain:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("\x1b[31mred\x1b[0m", "red"),
            ("\x1b]0;title\x07after", "after"),
            ("\x1b]8;;http://x\x1b\\link", "link"),
            ("\x9b2Jgone", "gone"),
            ("over\rwrite\x08\x00", "overwrite"),
            ("a\nb\r\nc\td", "a⏎b⏎c d"),
            ("\u202eevil\u2028", "evil"),
            ("[red]x[/red] :smile:", "[red]x[/red] :smile:"),
            ("é 漢 🙂", "é 漢 🙂"),
        ],
    )
    def test_text_that_acts_on_a_terminal_is_taken_out(self, text: str, expected: str) -> None:
        assert plain(text) == expected

    def test_every_control_character_goes(self) -> None:
        assert plain("".join(map(chr, [*range(10), *range(11, 32), *range(127, 160)])).replace("\t", "")) == ""

    def test_shortening_keeps_both_ends_within_the_limit(self) -> None:
        short = shorten("a" * 50 + "b" * 50, 12)
        assert short == "aaaaaa … bbb"
        assert shorten("a" * 12, 12) == "a" * 12


class TestCompletions:
    def test_best_and_worst_of_each_group(self) -> None:
        groups = [
            Group(
                "p1", [Completion(text, reward=reward) for text, reward in (("mid", 0.5), ("low", 0.0), ("top", 1.0))]
            ),
            Group("p2", [Completion("x", reward=-1.0, source="dataset"), Completion("y", reward=2.0)]),
        ]
        assert shown(groups, 9)[:2] == [["p1", "top", "policy", "1"], ["", "mid", "policy", "0.5"]]
        assert shown(groups, 4) == [
            ["p1", "top", "policy", "1"],
            ["", "low", "policy", "0"],
            ["p2", "y", "policy", "2"],
            ["", "x", "dataset", "-1"],
        ]
        assert [row[1] for row in shown(groups, 3)] == ["top", "low", "y"]

    def test_weights_follow_their_completion(self) -> None:
        groups = [
            Group("p1", [Completion("low", reward=0.0), Completion("top", reward=1.0)]),
            Group("p2", [Completion("also", reward=3.0), Completion("worse", reward=1.0)]),
        ]
        rows = shown(groups, 4, [-0.5, 0.5, 0.25, -0.25])
        assert [(row[1], row[4]) for row in rows] == [
            ("top", "+0.5"),
            ("low", "-0.5"),
            ("also", "+0.25"),
            ("worse", "-0.25"),
        ]

    def test_members_without_a_reward_give_way(self) -> None:
        members = [Completion("lost"), Completion("a", reward=1.0), Completion("b", reward=0.0)]
        assert [row[1] for row in shown([Group("p", members)], 2)] == ["a", "b"]
        assert shown([Group("p", [Completion("lost")])], 2) == [["p", "lost", "policy", "-"]]

    def test_ids_and_messages_where_there_is_no_text(self) -> None:
        ids = Group(None, [Completion(token_ids=[7, 8], reward=0.0)], prompt_ids=[1, 2])
        chat = Group([{"role": "user", "content": "hi"}], [Completion("a", reward=0.0)])
        assert [row[:2] for row in shown([ids, chat], 2)] == [["[1, 2]", "[7, 8]"], ["user: hi", "a"]]

    def test_output_is_neither_markup_nor_escape_codes(self) -> None:
        texts = ("[bold]x[/bold] :smile: [/nothing]", "\x1b[2Jwiped\x1b]0;t\x07")
        members = [Completion(text, reward=1.0 - n, source="[i]s\x1b[1m") for n, text in enumerate(texts)]
        rows = shown([Group("[red]p\x1b[2J", members)], 2)
        assert rows == [
            ["[red]p", "[bold]x[/bold] :smile: [/nothing]", "[i]s", "1"],
            ["", "wiped", "[i]s", "0"],
        ]


ROW = {"update": 3, "reward": 0.5, "loss": 0.01234567, "learning_rate": 1e-5, "grad_norm": 1.5, "log_ratio/mean": -2e-7}


class TestProgress:
    def test_without_a_terminal_a_line_where_asked(self) -> None:
        to, out = console(width=20)
        with ProgressDisplay(10, console=to) as progress:
            progress.update({**ROW, "update": 2}, line=False)
            progress.update(ROW, line=True)
            progress.note("saved [red]x\x1b[2J")
        assert out.getvalue() == (
            "update 3/10  reward 0.5  loss 0.01235  log_ratio/mean -2e-07  grad_norm 1.5\nsaved [red]x\n"
        )

    def test_an_evaluation_belongs_to_the_latest_update(self) -> None:
        to, out = console()
        with ProgressDisplay(10, start=4, console=to) as progress:
            progress.update({"eval/reward": 0.25, "reward": None}, line=True)
        assert out.getvalue() == "update 4/10  eval/reward 0.25\n"

    def test_a_terminal_has_a_bar(self) -> None:
        to, out = console(terminal=True)
        with ProgressDisplay(10, start=2, console=to) as progress:
            progress.update(ROW, line=False)
        text = out.getvalue()
        assert "3/10" in text and "reward 0.5  loss 0.01235" in text and "━" in text
        assert text.endswith("\x1b[?25h")  # The cursor is shown again.

    def test_disabled_shows_nothing(self) -> None:
        for terminal in (True, False):
            to, out = console(terminal=terminal)
            with ProgressDisplay(10, enabled=False, console=to) as progress:
                progress.update(ROW, line=True)
                progress.note("text")
            assert out.getvalue() == ""

    def test_a_table_can_be_noted(self) -> None:
        to, out = console()
        with ProgressDisplay(10, console=to) as progress:
            progress.note(completions_table([Group("p", [Completion("a", reward=1.0)])], 1))
        assert "completion" in out.getvalue() and "policy" in out.getvalue()
