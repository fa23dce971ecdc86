"""The command line: what it accepts, and the one line it answers a mistake with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from gvpo.cli.main import COMMANDS, main
from gvpo.cli.options import read_config, read_flag
from gvpo.errors import UserError
from gvpo.training.config import RunConfig

ENTRY = "import sys; from gvpo.cli.main import main; sys.exit(main())"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", ENTRY, *arguments], capture_output=True, text=True, timeout=60)


def put_command(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    module = ModuleType(f"gvpo.cli.{name}")
    setattr(module, name, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the trainer and keeps what it is given."""
    seen = SimpleNamespace()

    class Trainer:
        def __init__(self, model: Any, train_dataset: Any, reward_funcs: Any = None, **rest: Any) -> None:
            seen.model, seen.data, seen.rewards, seen.rest = model, train_dataset, reward_funcs, rest

        def train(self, resume_from_checkpoint: Any = None) -> None:
            seen.resume = resume_from_checkpoint

    module = ModuleType("gvpo.training.loop")
    module.GVPOTrainer = Trainer  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "gvpo.training.loop", module)
    return seen


class TestStart:
    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys; from gvpo.cli.main import main\n"
            "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'pandas'}\n"
            "assert main(['--help']) in (None, 0)\n"
            "print('group', sorted((heavy | {'pydantic', 'yaml', 'rich'}) & set(sys.modules)))\n"
            "assert main(['train', '--help']) in (None, 0)\n"
            "print('train', sorted(heavy & set(sys.modules)))\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "group []" in done.stdout
        assert "train []" in done.stdout

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
    def test_help_names_every_command(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments) in (None, 0)
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)

    def test_version_is_the_installed_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        from importlib.metadata import version

        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"gvpo {version('gvpo')}\n"


class TestMistakes:
    def test_a_mistake_is_one_line_and_exit_code_2(self) -> None:
        done = run("train", "--lerning-rate", "3")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "gvpo train: unknown option --lerning_rate; did you mean --learning_rate?\n"

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--vesion"], "gvpo: unknown option --vesion; did you mean --version?"),
            (["trian"], "gvpo: No such command 'trian'. Did you mean 'train'?"),
            (["train", "--zzz"], "gvpo train: unknown option --zzz; gvpo train --help lists them"),
            (["train", "--seed"], "gvpo train: Option '--seed' requires an argument."),
            (["train", "config.yaml"], "gvpo train: Got unexpected extra argument(s) (config.yaml)"),
            (["train", "--beta", "-1"], "gvpo train: --beta: input should be greater than or equal to 0, got -1"),
            (["train", "--config", "no.yaml"], "gvpo train: config 'no.yaml': no such file"),
            (
                ["train"],
                "gvpo train: no train_dataset; give --train_dataset FILE.jsonl, or set train_dataset in the config",
            ),
            (["doctor", "--model", "./no"], "gvpo doctor: model './no': no such folder; "),
        ],
    )
    def test_the_line_says_what_and_how_to_mend_it(
        self, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(line) and err.count("\n") == 1 and err.endswith("\n")

    def test_a_message_stays_one_line_without_control_codes(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def demo() -> None:
            raise UserError("row 3:\n  \x1b[2Jbad\r\nname")

        put_command(monkeypatch, "demo", demo)
        assert main(["demo"]) == 2
        assert capsys.readouterr().err == "gvpo demo: row 3: [2Jbad name\n"

    @pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), EOFError("a bug")])
    def test_a_bug_keeps_its_traceback(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def demo() -> None:
            raise error

        put_command(monkeypatch, "demo", demo)
        with pytest.raises(type(error), match="a bug"):
            main(["demo"])

    def test_an_interrupt_is_one_line_and_130(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def demo() -> None:
            raise KeyboardInterrupt

        put_command(monkeypatch, "demo", demo)
        assert main(["demo"]) == 130
        assert capsys.readouterr().err == "gvpo demo: interrupted\n"


def test_demo_is_found_by_name_with_its_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def demo(seed: int = 0, output_dir: str = "runs/demo", updates: int | None = None) -> None:
        seen.append((seed, output_dir, updates))

    put_command(monkeypatch, "demo", demo)
    main(["demo"])
    main(["demo", "--seed", "3", "--output_dir", "here", "--updates", "5"])
    assert seen == [(0, "runs/demo", None), (3, "here", 5)]


class TestFlags:
    def test_every_field_has_a_flag_with_its_description_and_default(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["train", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        for name, field in RunConfig.model_fields.items():
            default = field.default if not isinstance(field.default, bool) else str(field.default).lower()
            shown = "" if default is None else f" [default: {default}]"
            assert f"{field.description}{shown}" in text, name
            assert f" --{name} " in text

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("learning_rate", "1e-6", 1e-6),
            ("max_steps", "null", None),
            ("bf16", "true", True),
            ("model", "null", "null"),
            ("model", "135", "135"),
            ("run_name", "2024", "2024"),
            ("run_name", "null", None),
            ("reference", "3", 3),
            ("reference", "true", "true"),
            ("reward_funcs", "[rewards:a, b]", ["rewards:a", "b"]),
            ("reward_funcs", "rewards:a", "rewards:a"),
            ("reward_weights", "[1, 0.5]", [1, 0.5]),
            ("lr_scheduler_type", "cosine", "cosine"),
        ],
    )
    def test_text_is_read_as_what_the_field_holds(self, name: str, text: str, value: Any) -> None:
        read = read_flag(name, text)
        assert (read, type(read)) == (value, type(value))

    @pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate"])
    def test_both_spellings_reach_the_trainer(self, flag: str, trainer: SimpleNamespace) -> None:
        main(["train", "--train_dataset", "rows.jsonl", flag, "1e-6"])
        assert trainer.rest["config"].learning_rate == 1e-6

    @pytest.mark.parametrize(
        ("arguments", "value"),
        [
            (["--bf16"], True),
            (["--bf16", "--seed", "3"], True),
            (["--bf16", "true", "--seed", "3"], True),
            (["--seed", "3", "--bf16", "false"], False),
        ],
    )
    def test_a_switch_alone_is_true(self, arguments: list[str], value: bool, trainer: SimpleNamespace) -> None:
        main(["train", "--train_dataset", "rows.jsonl", *arguments])
        assert trainer.rest["config"].bf16 is value


class TestTrain:
    def test_file_and_flags_become_the_trainers_arguments(
        self, trainer: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("model: some/model\ntrain_dataset: rows.jsonl\nreward_funcs: [r:a]\nbeta: 0.3\nseed: 7\n")
        folder = str(tmp_path / "out")
        main(["train", "--config", str(file), "--seed", "8", "--eval_dataset", "held.jsonl", "--output_dir", folder])
        assert (trainer.model, trainer.data, trainer.rewards) == ("some/model", "rows.jsonl", ["r:a"])
        assert trainer.rest["eval_dataset"] == "held.jsonl"
        config = trainer.rest["config"]
        assert (config.beta, config.seed, config.output_dir) == (0.3, 8, folder)
        assert trainer.resume is None
        assert folder in capsys.readouterr().out

    def test_resume_takes_latest_or_a_path(self, trainer: SimpleNamespace, tmp_path: Path) -> None:
        checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        for text in ("latest", str(checkpoint)):
            folder = ["--output_dir", str(tmp_path / "run")]
            main(["train", "--train_dataset", "rows.jsonl", *folder, "--resume-from-checkpoint", text])
            assert trainer.resume == text

    def test_there_must_be_something_to_resume(self, trainer: SimpleNamespace, tmp_path: Path) -> None:
        folder = ["--output_dir", str(tmp_path / "run")]
        for text in ("latest", str(tmp_path)):
            assert main(["train", "--train_dataset", "rows.jsonl", *folder, "--resume-from-checkpoint", text]) == 2


class TestConfigFile:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model: x\nlerning_rate: 2\n", ", line 2, field 'lerning_rate': unknown; did you mean 'learning_rate'?"),
            ("# rate\n\nbeta: -2\n", ", line 3, field 'beta': input should be greater than or equal to 0, got -2"),
            ("1: 2\n", ", line 1, field '1': unknown; gvpo train --help lists them"),
            ("max_steps: 1\nwarmup_steps: 2\n", ": warmup_steps=2 is more than max_steps=1"),
            ("beta: true\n", ", line 1, field 'beta': must not be true or false, got True"),
        ],
    )
    def test_a_mistake_names_file_line_and_field(self, text: str, message: str, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        with pytest.raises(UserError) as error:
            read_config(str(file), {})
        assert str(error.value).startswith(f"{file}{message}")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("beta: 1\nseed: 2\nbeta: 3\n", "line 3: not YAML: 'beta' is given twice, first in line 1"),
            ("{beta: 1, beta: 2}\n", "line 1: not YAML: 'beta' is given twice, first in line 1"),
            ("run_name: 2024-99-99\n", "not YAML: month must be in 1..12"),
            ("[" * 5000, "not YAML"),
        ],
    )
    def test_yaml_that_cannot_be_is_one_line(self, text: str, message: str, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        with pytest.raises(UserError) as error:
            read_config(str(file), {})
        assert message in str(error.value) and "\n" not in str(error.value)

    def test_a_mistake_in_a_flag_names_the_flag(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("beta: 0.1\n")
        with pytest.raises(UserError, match=r"^--beta: input should be greater than or equal to 0, got -3"):
            read_config(str(file), {"beta": "-3"})

    def test_flags_win_over_a_file_that_is_wrong_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_text("warmup_steps: 2\nmax_steps: 1\n")
        assert read_config(str(file), {"max_steps": "4"}).warmup_steps == 2

    def test_a_file_that_is_not_text_is_one_line(self, tmp_path: Path) -> None:
        file = tmp_path / "run.yaml"
        file.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="not UTF-8"):
            read_config(str(file), {})


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, ten offline groups of three completions, and the working directory in it."""
    from gvpo.cli.doctor import tiny_llama

    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("tiny")
    members = [{"token_ids": [n, n + 1], "reward": float(n)} for n in range(1, 4)]
    rows = [{"prompt_ids": [1 + n, 2], "completions": members} for n in range(10)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


ARGUMENTS = ["train", "--model", "tiny", "--train_dataset", "rows.jsonl", "--groups_per_update", "2"]


class TestRun:
    def test_a_dry_run_shows_the_run_and_loads_no_weights(
        self, offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from transformers import AutoModelForCausalLM

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("weights were loaded")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
        assert main([*ARGUMENTS, "--dry-run", "--epochs_per_rollout", "3"]) in (None, 0)
        out = capsys.readouterr().out
        assert "groups_per_update: 2\n" in out
        facts = dict(line.strip().split("  ", 1) for line in out.split("would be\n")[1].splitlines())
        facts = {name: value.strip() for name, value in facts.items()}
        # Ten rows, two a update, are five updates an epoch; every group is used three times.
        assert facts["updates"] == "15"
        assert facts["train_dataset"] == "10 groups with their own completions"
        assert facts["reward functions"] == "none: the rows bring their rewards"
        assert facts["model"] == "tiny: folder found"
        assert facts["reference"] == "initial"
        # Two updates share a rollout by default; two groups of three completions are one update.
        assert (facts["prompts per rollout"], facts["completions per update"]) == ("4", "6")
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (["--reward_funcs", "nope:f"], "gvpo train: reward_funcs: 'nope:f'"),
            (["--train_dataset", "no.jsonl"], "gvpo train: "),
            (["--model", "./no"], "gvpo train: model './no'"),
            (["--reference", "./no"], "gvpo train: model './no'"),
            (["--reference", "rollout"], "gvpo train: config, field 'reference'"),
            (["--eval_steps", "2"], "gvpo train: config, field 'eval_steps'"),
            (["--report_to", "tensorbord"], "gvpo train: config, field 'report_to'"),
            (["--eval_dataset", "rows.jsonl"], "gvpo train: rows.jsonl, line 1: answers are drawn anew"),
            (["--reward_weights", "[1]"], "gvpo train: config, field 'reward_weights'"),
        ],
    )
    def test_a_dry_run_refuses_what_a_run_refuses(
        self, offline: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        refusals = []
        for dry in ([], ["--dry-run"]):
            assert main([*ARGUMENTS, *dry, *arguments]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith(line) and err.count("\n") == 1
            refusals.append(err)
        assert refusals[0] == refusals[1]

    def test_a_run_from_the_command_line_writes_its_folder(
        self, offline: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*ARGUMENTS, "--max_steps", "2"]) in (None, 0)
        rows = [json.loads(line) for line in Path("runs/train/metrics.jsonl").read_text().splitlines()]
        assert [row["update"] for row in rows] == [1, 2]
        out = capsys.readouterr().out
        assert "update 1/2" in out and "update 2/2" in out
        assert "runs/train/model" in out
        # The run's own config is a config file.
        assert read_config("runs/train/config.yaml", {}).groups_per_update == 2
        assert main([*ARGUMENTS, "--max_steps", "2"]) == 2
        assert "already holds a run" in capsys.readouterr().err
