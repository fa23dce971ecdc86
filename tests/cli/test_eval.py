"""`gvpo eval`: what it draws and scores, and that stopping, killing and failing lose nothing and change nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training_helpers import END, letters_tokenizer, tiny_model
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from gvpo.cli.main import main
from gvpo.evaluation import run as run_module
from gvpo.evaluation.run import problem_seed
from gvpo.group_files import locked_file, read_groups
from gvpo.models.loading import load_model
from gvpo.sampling.sampler import SamplingParams
from gvpo.sampling.torch_sampler import TorchSampler
from sources.completions_server import Reply, chat_reply, error_reply, serving

PROBLEMS = [("a", "b"), ("bc", "c"), ("d e", "e"), ("fgh", "i"), ("ij", "k"), ("k", "l"), ("l", "m")]
DRAW = ["--model", "tiny", "--max_completion_length", "5", "--template", "plain", "--reward", "exact_match"]
TASK = ["--task", "letters.jsonl", "--batch", "2"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model and a task."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder / "tiny")
    letters_tokenizer().save_pretrained(folder / "tiny")
    write_rows(folder / "letters.jsonl", [{"problem": problem, "answer": answer} for problem, answer in PROBLEMS])
    disable_progress_bar()
    yield folder
    enable_progress_bar()


@pytest.fixture(scope="module")
def finished(saved: Path) -> Path:
    """The folder of a finished run, with three completions a problem."""
    folder, before = saved / "finished", Path.cwd()
    os.chdir(saved)
    try:
        assert evaluate("finished", "-k", "3") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def here(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: empty but for links to the model and the task."""
    for name in ("tiny", "letters.jsonl"):
        (tmp_path / name).symlink_to(saved / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: str | Path, rows: list[Any]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluate(out: str, *more: str) -> int:
    return main(["eval", *DRAW, *TASK, "--out", out, *more]) or 0


def score(out: str, rows: list[Any], *more: str) -> int:
    """Evaluate completions that are there."""
    write_rows("given.jsonl", rows)
    return main(["eval", "--completions", "given.jsonl", "--out", out, *more]) or 0


def files(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def results(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "results.json").read_text())


class TestDraws:
    @pytest.mark.parametrize("k", [1, 3])
    def test_a_run_keeps_all_that_was_drawn(self, k: int) -> None:
        sampling = ["--temperature", "0.7", "--top_p", "0.9", "--top_k", "9", "--seed", "5"]
        assert evaluate("run", "-k", str(k), *sampling, "--rollout_dtype", "float32") == 0
        groups = list(read_groups("run/letters.jsonl"))
        model, tokenizer = load_model("tiny")
        assert tokenizer is not None
        prompts = [tokenizer.encode(problem) for problem, _ in PROBLEMS]
        seeds = [problem_seed(5, f"letters/{n}") for n in range(len(PROBLEMS))]
        drawn = TorchSampler(model, {END}).sample(prompts, k, SamplingParams(5, 0.7, 0.9, 9), seeds=seeds)
        assert [[one.token_ids for one in group.completions] for group in groups] == [
            [one.token_ids for one in samples] for samples in drawn
        ]
        assert [group.id for group in groups] == [f"letters/{n}" for n in range(len(PROBLEMS))]
        assert [group.prompt for group in groups] == [problem for problem, _ in PROBLEMS]
        for group, samples, (problem, answer) in zip(groups, drawn, PROBLEMS, strict=True):
            assert group.columns["problem"] == problem and group.columns["answers"] == [answer]
            for one, sample in zip(group.completions, samples, strict=True):
                assert one.text == tokenizer.decode(sample.token_ids, skip_special_tokens=True)
                assert one.reward == float(one.text.strip() == answer)
                assert one.truncated == (END not in sample.token_ids)
                assert "answer" in one.meta and ("vote" in one.meta) == (k > 1)

    def test_what_is_said_of_the_drawing(self) -> None:
        assert evaluate("greedy", "--limit", "1") == 0
        assert evaluate("several", "--limit", "1", "-k", "2") == 0
        how = [
            [results(run)["settings"]["tasks"]["letters"][name] for name in ("num_samples", "temperature", "top_p")]
            for run in ("greedy", "several")
        ]
        assert how == [[1, 0.0, 1.0], [2, 0.6, 0.95]]
        assert results("greedy")["settings"]["template"] == "plain"

    def test_a_problem_draws_the_same_in_any_company(self) -> None:
        write_rows("other.jsonl", [{"problem": "m", "answer": "a"}])
        assert evaluate("alone", "-k", "3", "--batch", "3") == 0
        assert evaluate("second", "-k", "3", "--batch", "3", "--task", "other.jsonl", "--task", "letters.jsonl") == 0
        assert files("alone")["letters.jsonl"] == files("second")["letters.jsonl"]
        assert list(results("second")["tasks"]) == ["letters", "other"]

    def test_any_sampler_takes_the_weights_before_it_draws(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Engine(TorchSampler):
            ready = False

            def sync(self) -> None:
                self.ready = True

            def sample_one_by_one(self, *arguments: Any, **options: Any) -> None:
                assert self.ready
                super().sample_one_by_one(*arguments, **options)

        used = []
        monkeypatch.setattr("gvpo.training.samplers.check_sampler", lambda config: used.append(config.use_vllm))
        monkeypatch.setattr(
            "gvpo.training.samplers.make_sampler", lambda config, model, tokenizer: Engine(model, {END})
        )
        assert evaluate("run", "--use_vllm") == 0
        assert used == [True] and results("run")["settings"]["use_vllm"] is True

    def test_the_template_suits_the_tokenizer(self) -> None:
        letters_tokenizer("{% for m in messages %}{{ m['content'] }}~{% endfor %}").save_pretrained("chat")
        tiny_model(max_position_embeddings=4096).save_pretrained("chat")
        tiny_model(max_position_embeddings=4096).save_pretrained("base")
        letters_tokenizer().save_pretrained("base")
        how = [*TASK, "--limit", "1", "--reward", "exact_match", "--max_completion_length", "2"]
        for name, template in (("chat", "chat"), ("base", "qwen-math-raw")):
            assert main(["eval", "--model", name, *how, "--out", f"run-{name}"]) == 0
            assert results(f"run-{name}")["settings"]["template"] == template


class TestStopping:
    def test_stopped_it_says_so_and_goes_on(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stop_after(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert evaluate("run", "-k", "3") == 143
        assert capsys.readouterr().out == "run: 4 of 7 problems; stopped, the same command goes on from here\n"
        assert set(files("run")) == {"settings.json", "letters.jsonl"}
        assert evaluate("run", "-k", "3") == 0
        assert files("run") == files(finished)

    @pytest.mark.parametrize("kept", [0, 700, 0.5, -1])
    def test_wherever_it_was_killed_it_ends_with_the_same_files(self, finished: Path, kept: float) -> None:
        """What a kill leaves of a file that is appended to is any beginning of it; kept: its bytes, or their share."""
        shutil.copytree(finished, "run")
        for name in ("results.json", "results.txt"):
            Path("run", name).unlink()
        path = Path("run/letters.jsonl")
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept if kept >= 1 or kept <= 0 else kept * len(whole))])
        assert evaluate("run", "-k", "3") == 0
        assert files("run") == files(finished)

    def test_killed_within_a_line_it_ends_with_the_same_files(self) -> None:
        """Killed in the second batch, with its first group written and half of its second."""
        code = (
            "import os, signal, sys\n"
            "from gvpo import group_files\n"
            "from gvpo.cli.main import main\n"
            "lines, write = [], os.write\n"
            "def last(file, line):\n"
            "    lines.extend([line] * (bytes(line[:6]) == b'{\"id\":'))\n"
            "    if len(lines) < 4: return write(file, line)\n"
            "    write(file, line[: len(line) // 2])\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "group_files.os.write = last\n"
            "main(sys.argv[1:])\n"
        )
        write_rows("given.jsonl", [{"completion": answer} for _, answer in PROBLEMS])
        how = ["eval", "--completions", "given.jsonl", "--reward", "exact_match", *TASK, "--out"]
        done = subprocess.run([sys.executable, "-c", code, *how, "run"], capture_output=True, text=True, timeout=120)
        assert done.returncode == -signal.SIGKILL, done.stderr
        left = files("run")["letters.jsonl"]
        assert left.count(b"\n") == 3 and not left.endswith(b"\n")
        for folder in ("run", "whole"):
            assert main([*how, folder]) == 0
        assert files("run") == files("whole")

    def test_finished_it_is_shown_again(
        self, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(finished, "run")
        monkeypatch.setattr("gvpo.models.loading.load_model", None)
        assert evaluate("run", "-k", "3") == 0
        table = (finished / "results.txt").read_text()
        assert capsys.readouterr().out == f"run: is finished; another --out evaluates anew\n{table}"
        assert files("run") == files(finished)

    @pytest.mark.parametrize(
        ("more", "line"),
        [
            (["--seed", "1"], "was evaluated with seed 42, now it is 1"),
            (["-k", "2"], "was evaluated with tasks.letters.num_samples 3, now it is 2"),
            (["--temperature", "0.5"], "was evaluated with tasks.letters.temperature 0.6, now it is 0.5"),
            (["--max_completion_length", "4"], "was evaluated with max_completion_length 5, now it is 4"),
            (["--template", "question"], 'was evaluated with template "plain", now it is "question"'),
            (
                ["--reward", "last_number"],
                'was evaluated with tasks.letters.reward "exact_match", now it is "last_number"',
            ),
            (["--limit", "2"], "was evaluated with tasks.letters.problems 7, now it is 2"),
            (["--task", "more.jsonl"], "was evaluated with tasks letters, now it is letters, more"),
            (["--model", "other"], 'was evaluated with model "tiny", now it is "other"'),
        ],
    )
    def test_another_setting_is_refused_by_name(
        self, more: list[str], line: str, finished: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.copytree(finished, "run")
        shutil.copytree("tiny", "other")
        write_rows("more.jsonl", [{"problem": "m", "answer": "1"}])
        assert evaluate("run", "-k", "3", *more) == 2
        assert capsys.readouterr().err == f"gvpo eval: run: {line}; give that, or another --out\n"
        assert files("run") == files(finished)

    def test_weights_that_were_trained_on_are_another_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("tiny").unlink()
        for seed in (0, 1):
            tiny_model(seed).save_pretrained("tiny")
            letters_tokenizer().save_pretrained("tiny")
            assert evaluate("run") == 2 * seed
        assert "gvpo eval: run: was evaluated with weights " in capsys.readouterr().err

    def test_a_reward_that_fails_leaves_what_was_scored(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("judge.py").write_text(
            "def strict(completions, problem, **columns):\n"
            "    if 'd e' in problem: raise RuntimeError('no judge')\n"
            "    return [1.0] * len(completions)\n"
        )
        monkeypatch.syspath_prepend(".")
        assert evaluate("run", "--reward", "judge:strict") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "no judge" in err
        assert err.endswith("; 2 of 7 problems are in run, the same command goes on from there\n")
        assert len(list(read_groups("run/letters.jsonl"))) == 2


def stop_after(monkeypatch: pytest.MonkeyPatch, batches: int, act: Callable[[], None]) -> None:
    """Have `act` done when so many batches are about to be written."""
    write, seen = run_module.append_groups, []

    def writing(groups: Any, path: Any) -> int:
        seen.append(path)
        if len(seen) == batches:
            act()
        return write(groups, path)

    monkeypatch.setattr(run_module, "append_groups", writing)


MATHS = ["72", "\\frac{1}{2}", "x^2+1", "(3,4)", "-5", "1000", "\\sqrt{2}", "50\\%"]


class TestGiven:
    def boxed(self, answers: list[str]) -> list[Any]:
        return [{"completion": f"So the answer is \\boxed{{{answer}}}."} for answer in answers]

    def test_the_answers_themselves_are_all_right_and_shifted_none(self) -> None:
        write_rows("maths.jsonl", [{"problem": f"p{n}", "answers": [answer]} for n, answer in enumerate(MATHS)])
        assert score("right", self.boxed(MATHS), "--task", "maths.jsonl") == 0
        assert score("wrong", self.boxed(MATHS[1:] + MATHS[:1]), "--task", "maths.jsonl") == 0
        found = [results(run)["tasks"]["maths"] for run in ("right", "wrong")]
        assert [one["pass@1"] for one in found] == [1.0, 0.0]
        assert [one["unscored"] for one in found] == [0, 0]
        assert [one["interval"]["by"] for one in found] == ["wilson"] * 2
        answers = [group.completions[0].meta["answer"] for group in read_groups("right/maths.jsonl")]
        assert answers[:2] == MATHS[:2]

    def test_equal_answers_vote_together(self) -> None:
        """Three write the half in three ways, two write 2: half wins."""
        write_rows("maths.jsonl", [{"problem": "p", "answer": "\\frac{1}{2}"}])
        texts = [f"\\boxed{{{answer}}}" for answer in ("2", "0.5", "2", "1/2", "\\frac{1}{2}")]
        assert score("run", [{"completions": texts}], "--task", "maths.jsonl") == 0
        (group,) = read_groups("run/maths.jsonl")
        assert [one.meta["vote"] for one in group.completions] == [0, 1, 0, 1, 1]
        found = results("run")["tasks"]["maths"]
        assert (found["pass@1"], found["maj@k"], found["pass@"]["5"]) == (0.6, 1.0, 1.0)
        assert found["pass@"] == {"1": 0.6, "2": 0.9, "4": 1.0, "5": 1.0}  # 1 - C(2, 2) / C(5, 2) = 0.9

    def test_tasks_follow_each_other_in_the_file(self) -> None:
        write_rows("other.jsonl", [{"problem": "m", "answer": "a"}])
        rows = [{"completions": [answer, "?"]} for _, answer in PROBLEMS] + [{"completion": "b"}]
        tasks = ["--task", "letters.jsonl", "--task", "other.jsonl", "--reward", "exact_match"]
        assert score("run", rows, *tasks) == 0
        found = results("run")
        assert {name: task["pass@1"] for name, task in found["tasks"].items()} == {"letters": 0.5, "other": 0.0}
        assert found["average"]["pass@1"] == 0.25
        assert found["tasks"]["letters"]["mean_length"] is None

    def test_a_runs_completions_can_be_judged_anew(self) -> None:
        assert evaluate("run", "-k", "2") == 0
        how = ["--task", "letters.jsonl", "--reward", "exact_match", "--out", "again"]
        assert main(["eval", "--completions", "run/letters.jsonl", *how]) == 0
        assert results("again")["tasks"] == results("run")["tasks"]

    def test_none_counts_as_not_right_and_is_shown(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Path("judge.py").write_text(
            "def unsure(completions, **columns):\n    return [None if one == '?' else 1.0 for one in completions]\n"
        )
        monkeypatch.syspath_prepend(".")
        rows = [{"completion": "?" if n < 2 else "b"} for n in range(7)]
        assert score("run", rows, "--task", "letters.jsonl", "--reward", "judge:unsure") == 0
        found = results("run")["tasks"]["letters"]
        assert (found["unscored"], found["right"], found["pass@1"]) == (2, 5, 5 / 7)
        assert "letters: 2 completions have no verdict, and count as not right\n" in capsys.readouterr().out

    def test_other_completions_in_the_file_are_another_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        how = ["--task", "letters.jsonl", "--reward", "exact_match"]
        assert score("run", [{"completion": "a"}] * 7, *how) == 0
        assert score("run", [{"completion": "b"}] * 7, *how) == 2
        assert "was evaluated with completions_digest" in capsys.readouterr().err


class TestGivenMistakes:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"problem": "a"}, "given.jsonl, line 3, field 'problem': 'a', and the task has 'd e' in this place ("),
            ({"question": "a"}, "given.jsonl, line 3, field 'question': 'a', and the task has 'd e' in this place ("),
            ({"columns": {"problem": "a"}}, "given.jsonl, line 3, field 'problem': 'a', and the task has"),
            ({"completions": ["x"]}, "given.jsonl, line 3: both 'completion' and 'completions'; give one of them"),
        ],
    )
    def test_refused(self, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [{"completion": answer} for _, answer in PROBLEMS]
        rows[2] |= change
        assert score("run", rows, *TASK, "--reward", "exact_match") == 2
        assert capsys.readouterr().err.startswith(f"gvpo eval: {message}")
        assert not Path("run").exists()


class TestServer:
    def ask(self, url: str, *more: str) -> int:
        how = ["--task", "letters.jsonl", "--batch", "2", "--reward", "exact_match", "--out", "run"]
        return main(["eval", "--server", url, "--model", "m", *how, *more]) or 0

    @pytest.fixture(autouse=True)
    def no_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gvpo.server.time.sleep", lambda seconds: None)

    def answer(self, path: str, payload: dict[str, Any]) -> Reply:
        problem = payload["messages"][0]["content"].partition("\n")[0]
        return chat_reply(*[dict(PROBLEMS)[problem]] * payload["n"], tokens=7 * payload["n"])

    def test_it_draws_scores_and_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        with serving(self.answer) as served:
            assert self.ask(served.url) == 0
        assert {headers["Authorization"] for _, _, headers in served.requests} == {"Bearer secret"}
        assert {payload["max_tokens"] for payload in served.payloads} == {2048}
        assert sorted(payload["seed"] for payload in served.payloads) == sorted(
            problem_seed(42, f"letters/{n}") % 2**31 for n in range(7)
        )
        found = results("run")
        assert found["tasks"]["letters"]["pass@1"] == 1.0
        assert found["tasks"]["letters"]["mean_length"] == found["tasks"]["letters"]["mean_length_right"] == 7
        assert found["settings"]["template"] == "chat"
        assert b"secret" not in b"".join(files("run").values())

    def test_several_a_request_share_their_count(self) -> None:
        with serving(self.answer) as served:
            assert self.ask(served.url, "-k", "2") == 0
        assert {payload["n"] for payload in served.payloads} == {2}
        found = results("run")["tasks"]["letters"]
        assert (found["mean_length"], found["mean_length_right"]) == (7, None)

    def test_a_server_that_goes_away_loses_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        with serving(self.answer) as served:
            url = served.url
            served_before = 0

            def failing(path: str, payload: dict[str, Any]) -> Reply:
                nonlocal served_before
                served_before += 1
                return self.answer(path, payload) if served_before <= 4 else error_reply(503, "going down")

            with serving(failing) as other:
                assert self.ask(other.url, "--out", "cut") == 2
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and "HTTP status 503 (going down)" in err
            assert err.endswith("; 4 of 7 problems are in cut, the same command goes on from there\n")
            kept = files("cut")
            change_server("cut", url)
            assert self.ask(url, "--out", "cut") == self.ask(url) == 0
            assert files("cut")["letters.jsonl"].startswith(kept["letters.jsonl"])
            assert files("cut") == files("run")

    def test_a_server_that_refuses_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.ask("http://127.0.0.1:9") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith("gvpo eval: http://127.0.0.1:9/v1/chat/completions: the connection failed")


def change_server(folder: str, url: str) -> None:
    """The server came back, at another address."""
    path = Path(folder, "settings.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "server": url}, indent=2) + "\n")


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            ([], "nothing to evaluate on; give --suite math, or --task NAME or FILE.jsonl"),
            (["--suite", "maths"], "--suite 'maths': no such suite; did you mean 'math'?"),
            (["--task", "amcc"], "task 'amcc': "),
            (["--task", "no.jsonl"], "no.jsonl: no such file; check the path"),
            (["--task", "null.jsonl"], "null.jsonl, line 2, field 'answers': null"),
            (["--task", "textless.jsonl"], "textless.jsonl, line 1, field 'problem': missing"),
            (["--task", "letters.jsonl", "--task", "sub/letters.jsonl"], "--task sub/letters.jsonl: another task is"),
            (["--suite", "math", "--data_dir", "sub"], "sub/aime24.jsonl: no such file"),
            (
                ["--suite", "math", "--temperature", "0"],
                "temperature 0 draws the same completion 32 times for 'aime24'",
            ),
            ([*TASK, "--template", "plane"], "template 'plane': no such template; did you mean 'plain'?"),
            ([*TASK, "--reward", "exact_mach"], "--reward: no ready-made reward is named 'exact_mach'; did you mean"),
            ([*TASK, "--temperature", "-1"], "temperature is -1.0: give 0 (greedy) or a positive number"),
            ([*TASK, "--top_p", "0"], "top_p is 0.0: give a number above 0 and at most 1"),
            ([*TASK, "-k", "0"], "Invalid value for"),
            ([*TASK, "--model", "./no"], "model './no': no such folder; "),
            ([*TASK, "--rollout_dtype", "half"], "--rollout_dtype: input should be 'auto', 'float32' or 'bfloat16'"),
            ([*TASK, "--use_vllm"], "use_vllm: "),
            ([*TASK, "--max_completion_length", "64"], "letters.jsonl, line 1, field 'prompt': 1 tokens and max_comp"),
            ([*TASK, "--server", "localhost"], "server address 'localhost': write it as http://host:port/v1"),
            ([*TASK, "--server", "http://h", "--use_vllm"], "--use_vllm: is for a model on this machine, and --server"),
            ([*TASK, "--out", "tiny"], "tiny: holds something other than an evaluation; give another --out"),
            ([*TASK, "--out", "letters.jsonl"], "letters.jsonl: is a file; give a folder as --out"),
        ],
    )
    def test_each_is_one_line(
        self, arguments: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_rows("null.jsonl", [{"problem": "a", "answers": ["b"]}, {"problem": "a", "answers": None}])
        write_rows("textless.jsonl", [{"answer": "b"}])
        Path("sub").mkdir()
        Path("sub/letters.jsonl").write_bytes(Path("letters.jsonl").read_bytes())
        before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
        assert main(["eval", *DRAW, "--out", "run", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"gvpo eval: {line}")
        assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before

    @pytest.mark.parametrize(
        ("rows", "line"),
        [
            (
                [{"completion": "a"}] * 6,
                "given.jsonl: 6 rows for 7 problems (letters 7); give one row a problem, in order",
            ),
            (
                [{"completion": "a"}] * 8,
                "given.jsonl: 8 rows for 7 problems (letters 7); give one row a problem, in order",
            ),
            (
                [{"completions": ["a", "b"]}] * 6 + [{"completion": "a"}],
                "given.jsonl, line 7: 1 completions, and given.jsonl, line 1 has 2; give all of a task equally many",
            ),
            ([{"text": "a"}] * 7, "given.jsonl, line 1: no completions; give 'completions', a list of texts, or one"),
            ([{"completions": []}] * 7, "given.jsonl, line 1, field 'completions': an empty list"),
            ([{"completions": [1]}] * 7, "given.jsonl, line 1, field 'completions[0]': expected a string or an object"),
            (["a"] * 7, "given.jsonl, line 1: no completions; give 'completions'"),
        ],
    )
    def test_completions_that_do_not_fit(self, rows: list[Any], line: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert score("run", rows, "--task", "letters.jsonl", "--reward", "exact_match") == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith(f"gvpo eval: {line}")
        assert not Path("run").exists()

    @pytest.mark.parametrize("option", ["--temperature", "--num_samples", "--seed", "--model", "--server"])
    def test_completions_that_are_there_are_not_drawn(self, option: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert score("run", [{"completion": "a"}] * 7, "--task", "letters.jsonl", option, "1") == 2
        assert capsys.readouterr().err.startswith(f"gvpo eval: {option}: says how completions are drawn")

    def test_two_at_once_in_one_folder(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(finished, "run")
        with locked_file(Path("run/.lock"), "ab"):
            assert evaluate("run", "-k", "3") == 2
        assert "gvpo eval: run: another process is evaluating into it; wait, or give" in capsys.readouterr().err

    def test_a_file_of_other_groups_in_the_folder(self, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(finished, "run")
        Path("run/results.json").unlink()
        path = Path("run/letters.jsonl")
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::-1]))
        assert evaluate("run", "-k", "3") == 2
        assert "run/letters.jsonl, group 1: of problem letters/6, expected letters/0" in capsys.readouterr().err
