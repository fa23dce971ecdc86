"""The command from end to end: every claim holds, and what it writes and refuses."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from gvpo.cli.main import main
from gvpo.lab.run import FAMILIES

FIGURES = {"uniqueness", "sampling", "iterations", "pairs", "grpo", "gradient_variance", "ablations"}


class Run(NamedTuple):
    """What `gvpo lab --out DIR` gave back, printed and wrote."""

    code: int | None
    output: str
    folder: Path


@pytest.fixture(scope="module")
def whole_lab(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("lab") / "new" / "folder"
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = main(["lab", "--out", str(folder)])
    return Run(code, output.getvalue(), folder)


def entries(run: Run) -> list[dict]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return json.loads((run.folder / "lab.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_every_claim_holds(whole_lab: Run) -> None:
    assert [entry for entry in entries(whole_lab) if not entry["holds"]] == []
    assert whole_lab.code == 0
    count = len(entries(whole_lab))
    assert f"{count} of {count} claims hold" in whole_lab.output and "FAILS" not in whole_lab.output


def test_every_family_has_claims_under_its_name(whole_lab: Run) -> None:
    names = [entry["claim"] for entry in entries(whole_lab)]
    assert len(set(names)) == len(names)
    assert list(dict.fromkeys(name.split("/")[0] for name in names)) == list(FAMILIES)


def test_an_entry_says_what_was_measured_and_how_near_it_must_be(whole_lab: Run) -> None:
    for entry in entries(whole_lab):
        assert list(entry) == ["claim", "statement", "measured", "tolerance", "holds"]
        assert entry["measured"] and list(entry["measured"]) == list(entry["tolerance"])
        assert entry["statement"].endswith(".")
        assert any(bound != "reported" for bound in entry["tolerance"].values())


def test_figures_are_written_as_png_and_svg(whole_lab: Run) -> None:
    written = {path.name for path in whole_lab.folder.iterdir()}
    assert written == {"lab.json", "lab.md"} | {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")}
    for name in FIGURES:
        assert (whole_lab.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (whole_lab.folder / f"{name}.svg").read_text(encoding="utf-8")[:2000]


def test_the_page_of_the_documentation_has_every_claim_and_its_figures(whole_lab: Run) -> None:
    page = Path(__file__).parents[2] / "docs" / "lab.md"
    text = page.read_text(encoding="utf-8")
    for entry in entries(whole_lab):
        assert f"| `{entry['claim']}` | {entry['statement'].replace('|', '&#124;')} |" in text
    for name in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (page.parent / name).stat().st_size < 150_000


def test_lines_fit_where_the_output_is_no_terminal(whole_lab: Run) -> None:
    assert max(map(len, whole_lab.output.replace(str(whole_lab.folder), "DIR").splitlines())) <= 120


def test_numbers_are_the_same_each_time(whole_lab: Run, tmp_path: Path) -> None:
    assert main(["lab", "--only", "finite-groups", "--only", "iterations", "--out", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "lab.json").read_text())
    before = {entry["claim"]: entry for entry in entries(whole_lab)}
    assert {entry["claim"].split("/")[0] for entry in again} == {"finite-groups", "iterations"}
    assert [before[entry["claim"]] for entry in again] == again
    assert (tmp_path / "iterations.svg").read_bytes() == (whole_lab.folder / "iterations.svg").read_bytes()


class TestMistakes:
    def refused(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        assert main(["lab", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("gvpo lab: ")
        return err

    def test_an_unknown_family(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "'samplng' is no family of claims; did you mean 'sampling'?" in self.refused(
            capsys, "--only", "pairs", "--only", "samplng"
        )

    def test_an_out_that_is_a_file(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        assert "is a file: name a folder" in self.refused(capsys, "--out", str(tmp_path / "file"))
        assert "is empty: name a folder" in self.refused(capsys, "--out", "")
        assert "cannot be written" in self.refused(capsys, "--out", str(tmp_path / "file" / "below"))
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write")
    def test_an_out_that_cannot_be_written(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "cannot be written" in self.refused(capsys, "--out", "/proc/lab")
        assert "cannot be written" in self.refused(capsys, "--out", "/proc")

    def test_no_matplotlib(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert "pip install 'gvpo[lab]'" in self.refused(capsys, "--out", str(tmp_path / "lab"))
        assert not (tmp_path / "lab").exists()
        assert main(["lab", "--only", "finite-groups"]) == 0


def test_without_out_no_plotting_is_imported() -> None:
    code = (
        "import sys; from gvpo.cli.main import main; main(['lab', '--only', 'finite-groups'])\n"
        "print([name for name in ('matplotlib', 'transformers', 'pandas') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("[]\n")
