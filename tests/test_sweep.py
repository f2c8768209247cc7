"""Sweeps: the axes of a file, the identity of a run, what is shared, and going on after a kill.

``make sweepkill`` kills a sweep of six runs three times instead of one run of two.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lightning_blue.__main__ import main
from lightning_blue.cli.experiment_commands import parse
from lightning_blue.comparison.labels import labels
from lightning_blue.metrics.evaluation import Evaluation, RequestOutcome
from lightning_blue.metrics.matching import GeneratedAnswer
from lightning_blue.metrics.unedited import UneditedMeasurements
from lightning_blue.support.errors import InputError
from lightning_blue.sweeps.launch import run_here, slot_environments
from lightning_blue.sweeps.local_files import LocalFiles
from lightning_blue.sweeps.planned import SHARE_TARGETS, identity_of, plan_runs, resolved
from lightning_blue.sweeps.shared import covariance_tasks
from lightning_blue.sweeps.sweep_file import read_sweep
from lightning_blue.sweeps.tasks import NO_RESULT, Outcome, RunTask, Task, environment
from test_conf import CONF, flags, small_run  # noqa: F401  (a fixture)

PAPER = CONF / "paper"
WHOLE = "SWEEP_KILLS" in os.environ
KILLS = int(os.environ.get("SWEEP_KILLS", "1"))
pytestmark = pytest.mark.filterwarnings("ignore:.*args parameter is intended")
LIMIT = 600  # seconds; a machine may be busy


def write(folder: Path, parameters: dict, name: str = "sweep.yaml", **more: object) -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump({"parameters": parameters, **more}, sort_keys=False))
    return path


# the file


def test_combinations_are_the_product_with_run_files_before_keys(tmp_path):
    path = write(
        tmp_path,
        {
            "update.plan": {"values": ["even", "boundary"]},
            "method": {"values": ["rows/rect.yaml", "rows/memit.yaml + more.yaml"]},
            "guard.action": {"value": "off"},
            "update.layers": {"value": [1, 2]},
        },
    )
    sweep = read_sweep(path)
    assert sweep.name == "sweep"
    made = [sweep.args(values) for values in sweep.combinations()]
    keys = ["--guard.action=off", "--update.layers=[1, 2]"]
    rect = [f"--config={tmp_path / 'rows/rect.yaml'}"]
    memit = [f"--config={tmp_path / 'rows/memit.yaml'}", f"--config={tmp_path / 'more.yaml'}"]
    assert made == [
        [*files, f"--update.plan={plan}", *keys]
        for plan in ("even", "boundary")
        for files in (rect, memit)
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("parameters: {a.b: {values: [1]}}\nmethod: bayes", "method is 'bayes'"),
        ("parametrs: {a.b: {values: [1]}}", "no key 'parametrs'"),
        ("name: x", "no parameters"),
        ("parameters: {update.plan: [even]}", "either values or value"),
        ("parameters: {update.ridge: {min: 0, max: 1}}", "either values or value"),
        ("parameters: {update: {parameters: {plan: {values: [even]}}}}", "either values or value"),
        ("parameters: {update.plan: {values: []}}", "at least one value"),
        ("parameters: {run.name: {values: [a, b]}}", "decided by the sweep"),
        ("parameters: {a: [", "not valid YAML"),
        ("- a", "no keys and values"),
        (None, "no such sweep file"),
    ],
)
def test_files_that_are_no_sweep(tmp_path, content, said):
    path = tmp_path / "sweep.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said) as refused:
        read_sweep(path)
    assert "where:" in str(refused.value)
    assert "hint:" in str(refused.value)


def test_axes_can_be_narrowed(tmp_path):
    axes = {
        "update.plan": {"values": ["even", "boundary", "first"]},
        "update.rect_keep": {"values": [None, 0.4]},
        "update.past_keys": {"values": [True, False]},
    }
    sweep = read_sweep(write(tmp_path, axes))
    kept = sweep.narrowed(
        ["update.plan=first", "update.plan=even", "update.rect_keep=null", "update.past_keys=True"]
    )
    assert dict(kept.axes) == {
        "update.plan": ["first", "even"],
        "update.rect_keep": [None],
        "update.past_keys": [True],
    }
    for choice, said in (("plan=even", "no axis 'plan'"), ("update.plan=last", "no value 'last'")):
        with pytest.raises(InputError, match=said):
            sweep.narrowed([choice])


@pytest.mark.parametrize(
    "path",
    [*sorted(CONF.glob("*/*table2.yaml")), CONF / "real" / "orders.yaml"],
    ids=lambda p: p.stem,
)
def test_a_wandb_agent_takes_the_same_file(path):
    """W&B's own code makes the command of each combination; it asks for that combination alone."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    content = yaml.safe_load(path.read_text())
    sweep = read_sweep(path)
    combinations = list(sweep.combinations())
    for values in (combinations[0], combinations[-1]):
        given = {key: {"value": value} for key, value in {**sweep.fixed, **values}.items()}
        macros = create_sweep_command_args({"args": given})
        macros |= {"env": ["/usr/bin/env"], "interpreter": ["python"]}
        command: list[str] = []
        for part in create_sweep_command(content["command"]):
            macro = part[2:-1] if part.startswith("${") else None
            command += macros[macro] if macro else [part]
        assert command[:6] == [
            "/usr/bin/env",
            "python",
            "-m",
            "lightning_blue",
            "sweep",
            f"conf/{path.parent.name}/{path.name}",
        ]
        chosen, for_fit = parse("sweep", command[5:])
        assert not for_fit
        assert list(sweep.narrowed(chosen.choices).combinations()) == [values]


# identity


@pytest.fixture(scope="module")
def planned(small_run):  # noqa: F811
    """Plan the runs of a sweep over plans with the small run's flags."""

    def plan(path: Path, root: Path, *more: str):
        return plan_runs(read_sweep(path), root, [*flags(small_run, "llama3"), *more])

    return plan


LLAMA = {"model": {"value": str(CONF / "llama3_memit_blue.yaml")}}


def test_identity_is_what_a_run_is_and_not_where_or_under_which_name(planned, tmp_path, small_run):  # noqa: F811
    path = write(tmp_path, {**LLAMA, "update.plan": {"values": ["even", "boundary"]}})
    even, boundary = planned(path, tmp_path)
    assert even.identity != boundary.identity
    assert even.name == f"even-{even.identity[:10]}"
    elsewhere = ["--run.wandb=offline", "--model.covariance.cache=other"]
    elsewhere += ["--measure.judge.replies=elsewhere"]
    assert planned(path, tmp_path / "x", *elsewhere)[0].identity == even.identity
    named = write(
        tmp_path, {**LLAMA, "which": {"values": ["a/even.yaml", "a/boundary.yaml"]}}, "other.yaml"
    )
    (tmp_path / "a").mkdir()
    for plan in ("even", "boundary"):
        (tmp_path / "a" / f"{plan}.yaml").write_text(f"update: {{plan: {plan}}}")
    assert [run.identity for run in planned(named, tmp_path)] == [even.identity, boundary.identity]
    assert planned(path, tmp_path, "--update.ridge=3")[0].identity != even.identity
    narrowed = plan_runs(
        read_sweep(path).narrowed(["update.plan=even"]), tmp_path, flags(small_run, "llama3")
    )
    assert [run.name for run in narrowed] == [even.name]


def test_an_export_is_part_of_what_a_run_is(planned, tmp_path):
    """Weights are rounded to what is saved before they are measured for the last time."""
    path = write(tmp_path, {**LLAMA, "run.export": {"values": [True, False]}})
    exported, not_exported = planned(path, tmp_path)
    assert exported.identity != not_exported.identity
    # what is left out where nothing is exported: such runs keep their folders
    assert {**not_exported.config, "run/export": True} == exported.config


def test_identity_knows_the_content_of_local_files(planned, tmp_path, monkeypatch):
    facts = tmp_path / "almanac_facts.json"  # not the package's almanac
    facts.write_text('[{"subject": "Lyon", "prompt": "{} is near", "target_new": "Rome"}]')
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, {**LLAMA, "update.plan": {"values": ["even"]}})
    (run,) = planned(path, tmp_path, f"--data.path={facts}")
    assert run.identity == identity_of(run.config)
    keys = ("data/path", "data/controls", "measure/text", "measure/ability/data")
    for key in (*keys, "model/covariance/corpus", "model/covariance/path"):
        assert key in run.config
        for name in (str(facts), f"~/{facts.name}"):
            config = {**run.config, key: name}
            before = identity_of(config)
            facts.write_text(facts.read_text().replace("Rome", "Oslo"))
            assert identity_of(config) != before, (key, name)
            facts.write_text(facts.read_text().replace("Oslo", "Rome"))
            assert identity_of(config) == before, (key, name)


def test_one_byte_of_a_long_text_counts(tmp_path):
    """Between the blocks by which the files of models are told apart, too."""
    path = tmp_path / "facts.json"
    content = bytearray(b"0123456789abcdef") * (6 << 16)  # 6 MB
    path.write_bytes(content)
    before = LocalFiles().of({"data/path": str(path)})
    content[80_000] ^= 1
    path.write_bytes(content)
    assert LocalFiles().of({"data/path": str(path)}) != before


def test_names_of_the_package_are_no_paths(tmp_path, monkeypatch):
    packaged = LocalFiles().of({"data/path": "almanac", "measure/text": "almanac-heldout"})
    assert packaged["data/path"] == packaged["measure/text"] is not None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "almanac").write_text("a file that nothing reads")
    assert LocalFiles().of({"data/path": "almanac"})["data/path"] == packaged["data/path"]
    (tmp_path / "almanac-heldout").write_text("records of the user's")
    own = {"data/path": "almanac-heldout"}
    before = LocalFiles().of(own)["data/path"]
    (tmp_path / "almanac-heldout").write_text("other records")
    assert LocalFiles().of(own)["data/path"] != before


def test_covariances_with_a_file_for_each_layer_count(tmp_path):
    for layer in (4, 6, 8, 11):
        (tmp_path / f"stats-{layer}.npz").write_text("matrix")
    (tmp_path / "stats-old.npz").write_text("matrix")
    given = {"model/covariance/path": f"{tmp_path}/stats-{{}}.npz", "update/plan": "boundary"}
    planned = {**given, "update/layers": [4, 6, 8]}
    by_depth = {**given, "update/layers": None}
    # of the planned run only what it reads: the covariances of layers 4 and 8
    for name, counts in (
        ("4", (1, 1)),
        ("8", (1, 1)),
        ("6", (0, 1)),
        ("11", (0, 1)),
        ("old", (0, 0)),
    ):
        before = [LocalFiles().of(config) for config in (planned, by_depth)]
        (tmp_path / f"stats-{name}.npz").write_text("another")
        after = [LocalFiles().of(config) for config in (planned, by_depth)]
        assert tuple(int(a != b) for a, b in zip(before, after, strict=True)) == counts, name


def test_tasks_of_the_users_count_with_all_that_they_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.jsonl").write_text("{}")
    tasks = tmp_path / "tasks"
    (tasks / "shared").mkdir(parents=True)
    (tasks / "own.yaml").write_text(
        "include: shared/base.yaml\ntask: own\ndoc_to_text: !function ways.asked\n"
        "dataset_kwargs: {data_files: {test: 'rec*.jsonl'}}\n"
    )
    (tasks / "shared" / "base.yaml").write_text("include: ../own.yaml\ndataset_path: json\n")
    (tasks / "ways.py").write_text("def asked(record): return ''")
    (tasks / "other.yaml").write_text("task: other\n")
    config = {"measure/ability/tasks": ["paper", "tasks/own.yaml"]}
    read = ("tasks/own.yaml", "tasks/shared/base.yaml", "tasks/ways.py", "records.jsonl")
    for name in (*read, "tasks/other.yaml"):
        before = LocalFiles().of(config)
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert (LocalFiles().of(config) != before) is (name in read), name
    # names that the harness knows leave the hash of other runs as it is
    assert LocalFiles().of({"measure/ability/tasks": ["paper"]}) == LocalFiles().of({})


def test_notes_of_a_download_are_no_part_of_a_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = {"model/name_or_path": str(tmp_path)}
    before = LocalFiles().of(config)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "config.json.metadata").write_text("yesterday")
    assert LocalFiles().of(config) == before
    (tmp_path / "config.json").write_text("{ }")
    assert LocalFiles().of(config) != before


def test_runs_share_targets_unless_told_otherwise(planned, tmp_path):
    path = write(tmp_path, {**LLAMA, "update.plan": {"values": ["even"]}})
    for told, shares in (([], True), (["--model.cache_targets=false"], False)):
        (run,) = planned(path, tmp_path, *told)
        assert resolved(run.command[1:])["model"]["cache_targets"] is shares
        assert run.identity == planned(path, tmp_path)[0].identity
    assert resolved(run.args)["model"]["cache_targets"] is False  # by `fit`


def test_two_combinations_that_are_the_same_run_are_refused(planned, tmp_path):
    path = write(tmp_path, {**LLAMA, "update.plan": {"values": ["even", "even"]}})
    with pytest.raises(InputError, match="are the same run"):
        planned(path, tmp_path)


def test_a_folder_counts_by_its_content(planned, tmp_path):
    path = write(tmp_path, {**LLAMA, "update.plan": {"values": ["even"]}})
    (run,) = planned(path, tmp_path)
    assert run.state == "new"
    folder = tmp_path / "sweep" / f"called-otherwise-{run.identity[:10]}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    nested: dict = {}
    for key, value in {**run.config, "run/name": "called-otherwise"}.items():
        *above, last = key.split("/")
        place = nested
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(nested))
    assert run.state == "finished"
    assert run.folder == folder
    numbers = {"post/efficacy": 90.0, "edits/targets_read": 20, "seconds/total": 5.0}
    (folder / "summary.json").write_text(json.dumps(numbers))
    outcome = RunTask(run.name, tuple(run.command), run.root, run).result()
    assert outcome.said == "efficacy 90.0, targets of 20 edits read"
    nested["update"]["ridge"] = 3.0
    (folder / "config.yaml").write_text(yaml.safe_dump(nested))
    assert run.state == "new"
    refused = RunTask(run.name, tuple(run.command), run.root, run).run(environment())
    assert (refused.state, refused.said) == ("failed", NO_RESULT)  # nothing was overwritten
    assert not refused.log.exists()


# the committed sweeps


COUNTS = {
    "table2": (48, []),
    "table4": (48, ["data=zsre.yaml", "run=../gpt2xl_memit_blue.yaml", "run=../gptj_rect.yaml"]),
    "table5": (24, ["data=zsre.yaml", "run=../gptj_pmet.yaml", "run=../gptj_pmet_blue.yaml"]),
    "fig6": (8, []),
    "small_table2": (24, ["seed_everything=1"]),
    "small_baselines": (6, ["data.batch_size=20"]),
    "smollm_table2": (8, []),
    "counterfact": (24, ["model=smollm.yaml"]),
    "orders": (12, ["data.shuffle=1"]),
    "questions": (8, []),
}
SWEEPS = [
    path
    for folder in (PAPER, CONF / "real")
    for path in sorted(folder.glob("*.yaml"))
    if "parameters" in path.read_text()
]


def test_every_committed_sweep_has_a_test():
    assert {path.stem for path in SWEEPS} == set(COUNTS)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_committed_sweeps_resolve(path, tmp_path):
    """Without a model, data or a GPU: each combination is parsed as `fit` would."""
    count, choices = COUNTS[path.stem]
    sweep = read_sweep(path)
    assert sweep.name == path.stem
    assert len(list(sweep.combinations())) == count
    if path.stem == "table2":
        choices = ["data=counterfact.yaml"]
    runs = plan_runs(sweep.narrowed(choices), tmp_path)
    shown = {labels(run.config) for run in runs}
    assert len(shown) == (len(runs) if path.stem != "table5" else len(runs) // 2)
    for run in runs:
        assert run.config["guard/action"] == "warn"
        assert "${" not in json.dumps(run.config)
    if path.stem == "table2":
        models = {label.model for label in shown}
        assert models == {"Meta-Llama-3-8B-Instruct", "gpt-j-6b", "gpt2-xl"}
        methods = {(label.method, label.plan) for label in shown}
        named = ("MEMIT", "PRUNE", "RECT", "AlphaEdit")
        assert methods == {(name, plan) for name in named for plan in ("even", "boundary")}
        assert {run.config["data/edits"] for run in runs} == {2000}
        ridges = {
            run.config["model/name_or_path"].rpartition("/")[2]: run.config["update/ridge"]
            for run in runs
            if "alphaedit_blue" in run.name
        }
        assert ridges == {"Meta-Llama-3-8B-Instruct": 1, "gpt-j-6b": 95, "gpt2-xl": 80}
    if path.stem == "table4":
        assert {run.config["data/batch_size"] for run in runs} == {10_000}
    if path.stem == "fig6":
        assert {run.config["trainer/val_check_interval"] for run in runs} == {5}
        assert {run.config["measure/ability/every"] for run in runs} == {500}


# what is shared, and how tasks run


def test_covariances_are_collected_once_for_the_layers_that_runs_write(planned, tmp_path):
    axes = {**LLAMA, "update.plan": {"values": ["boundary", "even", "first", "last"]}}
    runs = planned(write(tmp_path, axes), tmp_path)
    (task,) = covariance_tasks(runs)  # even writes all layers
    assert task.command[0] == "stats"
    assert "--update.plan=even" in task.command
    assert task.name.endswith("layers-4-5-6-7-8")
    ends = covariance_tasks(runs[2:])
    assert [one.name.rpartition("layers-")[2] for one in ends] == ["4", "8"]
    assert covariance_tasks(runs[:1]) == []
    other = planned(write(tmp_path, axes), tmp_path, "--model.covariance.tokens_per_dim=5")
    assert len(covariance_tasks([*runs[:2], *other[:2]])) == 2
    given = planned(write(tmp_path, axes), tmp_path, "--model.covariance.path=f")
    assert covariance_tasks(given) == []


def test_covariances_that_are_gone_or_of_another_text_are_collected_again(
    planned,
    small_run,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """Whatever an earlier call of the sweep has done; what is there is left as it is."""
    text, stats = tmp_path / "text.txt", tmp_path / "stats"
    text.write_text((small_run / "text.txt").read_text())
    own = [f"--model.covariance.corpus={text}", f"--model.covariance.cache={stats}"]
    path = write(tmp_path, {**LLAMA, "update.plan": {"values": ["even", "boundary"]}})
    # in this process: it spares the seconds in which another one starts
    monkeypatch.setattr(Task, "_start", lambda task, *_: main(list(task.command)))

    (task,) = covariance_tasks(planned(path, tmp_path, *own))

    def collect() -> dict[str, int]:
        with redirect_stdout(io.StringIO()):
            assert task.run(environment()).state == "finished"
        return {file.name: file.stat().st_mtime_ns for file in stats.glob("*.safetensors")}

    first = collect()
    assert len(first) == 1
    assert collect() == first
    shutil.rmtree(stats)
    again = collect()
    assert again.keys() == first.keys()
    assert again != first
    text.write_text(text.read_text().replace("Basel", "Lyons"))
    assert len(collect()) == 2


def test_tasks_that_fail_do_not_stop_the_others(tmp_path):
    tasks = [
        Task("first", ("--version",), tmp_path),
        Task("bad", ("evaluat",), tmp_path),
        Task("last", ("--version",), tmp_path),
    ]
    outcomes: list[Outcome] = []
    run_here(tasks, 2, outcomes.append)
    ended = {outcome.name: outcome for outcome in outcomes}
    assert ended["first"].ok
    assert ended["last"].ok
    assert ended["bad"].state == "failed"
    assert "there is no command 'evaluat'" in ended["bad"].said
    assert "lightning-blue" in (tmp_path / "logs" / "first.log").read_text()


def test_a_reason_is_the_newest_attempts(tmp_path):
    """Not what an earlier one has left in the same log."""
    task = Task("bad", ("--version",), tmp_path)
    task.log.parent.mkdir()
    task.log.write_text("error: of yesterday\n")
    assert task.run(environment()).ok
    again = Task("bad", ("evaluat",), tmp_path).run(environment())
    assert again.said.startswith("there is no command 'evaluat'")


@dataclass(frozen=True)
class Noted(Task):
    """A process that notes who has started it, once so many others have started too."""

    by: str = ""
    others: int = 0

    def result(self) -> Outcome | None:
        done = self.root / "done" / self.name
        return Outcome(self.name, "finished", done.read_text()) if done.exists() else None

    @property
    def argv(self) -> list[str]:
        code = """if True:
            import os, sys, time
            root, name, by, others = sys.argv[1:]
            open(f"{root}/started/{name}-{os.getpid()}", "x").close()
            deadline = time.monotonic() + 30
            while len(os.listdir(f"{root}/started")) <= int(others):
                if time.monotonic() > deadline:
                    sys.exit(3)
                time.sleep(0.01)
            open(f"{root}/done/{name}", "x").write(by)
        """
        asked = map(str, (self.root, self.name, self.by, self.others))
        return [sys.executable, "-S", "-c", code, *asked]


@contextmanager
def held(lock: Path):
    """Hold a lock from another process, until the block ends."""
    lock.parent.mkdir(exist_ok=True)
    code = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    try:
        yield
    finally:
        holder.communicate("")


@pytest.fixture
def noted(tmp_path) -> Path:
    for name in ("started", "done"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_a_task_that_another_process_works_on_is_waited_for(noted):
    """The lock is held by the process that works, even if the one that started it died."""
    task = Noted("once", (), noted)
    outcomes: list[Outcome] = []
    worker = threading.Thread(target=lambda: outcomes.append(task.run(environment())))
    with held(task.lock):
        worker.start()
        worker.join(1)
        assert worker.is_alive()
        (noted / "done" / "once").write_text("another")  # what the other one did
    worker.join(LIMIT)
    assert [outcome.said for outcome in outcomes] == ["another"]
    assert not task.log.exists()  # nothing was started again


def test_a_task_that_another_process_works_on_comes_last(noted):
    """And is made where that process ends without having done it."""
    tasks = [Noted(name, (), noted, by="this") for name in ("busy", "second", "third")]
    ended: list[str] = []
    with ExitStack() as other:
        other.enter_context(held(tasks[0].lock))

        def on_end(outcome: Outcome) -> None:
            ended.append(outcome.name)
            if len(ended) == 2:
                other.close()

        sweep = threading.Thread(target=lambda: run_here(tasks, 1, on_end), daemon=True)
        sweep.start()
        sweep.join(60)
    assert ended == ["second", "third", "busy"]
    assert {file.name for file in (noted / "done").iterdir()} == set(ended)


def test_two_sweeps_on_one_folder_divide_the_runs(noted):
    """No task ends before two have started: one sweep with one process at a time is not enough."""
    names = [f"run-{number}" for number in range(6)]
    outcomes: dict[str, list[Outcome]] = {"one": [], "two": []}
    sweeps = [
        threading.Thread(
            target=run_here,
            args=([Noted(name, (), noted, by, others=1) for name in names], 1, ended.append),
            daemon=True,
        )
        for by, ended in outcomes.items()
    ]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join(60)
    for ended in outcomes.values():  # each knows what became of all of them
        assert sorted(outcome.name for outcome in ended) == names
        assert {outcome.state for outcome in ended} == {"finished"}
    started = [file.name.rpartition("-")[0] for file in (noted / "started").iterdir()]
    assert sorted(started) == names  # each once
    assert {(noted / "done" / name).read_text() for name in names} == {"one", "two"}


def test_each_slot_has_its_share_of_threads_or_its_own_gpu(monkeypatch):
    monkeypatch.setattr("lightning_blue.sweeps.launch.cores", lambda: 8)
    monkeypatch.setattr("lightning_blue.sweeps.launch.visible_devices", list)
    assert [slot["OMP_NUM_THREADS"] for slot in slot_environments(3)] == ["2", "2", "2"]
    monkeypatch.setattr("lightning_blue.sweeps.launch.visible_devices", lambda: ["4", "6"])
    slots = slot_environments(2)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["4", "6"]
    assert all("PL_GLOBAL_SEED" not in slot for slot in slots)


def test_slurm_jobs_are_submitted_as_one_array(tmp_path, monkeypatch):
    """With an ``sbatch`` that keeps what it is given."""
    pytest.importorskip("submitit")
    from lightning_blue.sweeps import slurm

    tools = tmp_path / "bin"
    tools.mkdir()
    for name, script in {"srun": "", "sbatch": f'cp "$1" {tmp_path}/got; echo job 12'}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    tasks = [Task(str(number), ("--version",), tmp_path) for number in range(3)]

    def at_once(jobs, poll_frequency):
        for job, task in zip(jobs, tasks, strict=True):
            job.exception = lambda: None
            job.result = lambda task=task: Outcome(task.name, "finished")
            yield job

    import submitit.helpers

    monkeypatch.setattr(submitit.helpers, "as_completed", at_once)
    outcomes: list[Outcome] = []
    slurm.run_on_slurm(tasks, 2, {"partition": "gpu"}, tmp_path / "jobs", outcomes.append)
    assert [outcome.name for outcome in outcomes] == ["0", "1", "2"]
    text = (tmp_path / "got").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--gpus-per-node=1", "--time=1440"):
        assert f"#SBATCH {line}" in text
    with pytest.raises(InputError, match="Unavailable parameter"):
        slurm.run_on_slurm(tasks, 2, {"partion": "gpu"}, tmp_path / "jobs", outcomes.append)
    (tools / "srun").unlink()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(InputError, match="srun"):
        slurm.run_on_slurm(tasks, 2, {}, tmp_path / "jobs", outcomes.append)


class Alone:
    """The strategy of a run of one process."""

    is_global_zero = True

    def broadcast(self, value):
        return json.loads(json.dumps(value))  # as far as another process


def measured_as(value: float) -> Evaluation:
    outcome = RequestOutcome("7", {"efficacy": 1 / 3}, value, None, 0.1, None, (True, False), "no")
    answer = GeneratedAnswer(
        0, "neighbours", "Rome is in", "Italy", ("it",), "a", "b", (1, 2), "end"
    )
    metrics = {"efficacy": {"value": value, "count": 1}, "perplexity": {"count": 1}}
    return Evaluation(metrics, [outcome], [answer])


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-320, math.inf])
def test_measurements_of_the_unedited_model_come_back_to_the_last_bit(tmp_path, value):
    cache = UneditedMeasurements(tmp_path / "unedited")
    identity = {"model": "a", "seed": 1}
    assert cache.shared(identity, Alone(), lambda: measured_as(value)) == measured_as(value)
    kept = cache.shared(identity, Alone(), lambda: pytest.fail("measured again"))
    assert kept == measured_as(value)
    assert cache.shared({"model": "a", "seed": 2}, Alone(), lambda: measured_as(3)) == measured_as(
        3
    )
    assert len(list(cache.folder.glob("*.json"))) == 2


def test_what_was_scored_by_other_rules_is_measured_again(tmp_path, monkeypatch):
    cache = UneditedMeasurements(tmp_path)
    with_answers, without = {"model": "a", "generation": {}}, {"model": "a"}
    for identity in (with_answers, without):
        cache.shared(identity, Alone(), lambda: measured_as(1))
    monkeypatch.setattr("lightning_blue.metrics.unedited.RULES", -1)
    assert cache.shared(with_answers, Alone(), lambda: measured_as(2)) == measured_as(2)
    assert cache.shared(without, Alone(), lambda: measured_as(2)) == measured_as(1)


def test_damaged_measurements_are_made_again(tmp_path):
    cache = UneditedMeasurements(tmp_path)
    cache.shared({"model": "a"}, Alone(), lambda: measured_as(1))
    (file,) = tmp_path.glob("*.json")
    for content in ("{", "[]", file.read_text().replace('"a"', '"b"')):
        file.write_text(content)
        assert cache.shared({"model": "a"}, Alone(), lambda: measured_as(2)) == measured_as(2)


def test_of_several_runs_one_measures(tmp_path):
    cache = UneditedMeasurements(tmp_path)
    made: list[int] = []

    def measure() -> Evaluation:
        time.sleep(0.2)
        made.append(1)
        return measured_as(len(made))

    found: list[Evaluation] = []
    runs = [
        threading.Thread(target=lambda: found.append(cache.shared({}, Alone(), measure)))
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(LIMIT)
    assert made == [1]
    assert found == [measured_as(1)] * 3


# from end to end


@pytest.fixture(scope="module")
def small_sweep(small_run, tmp_path_factory):  # noqa: F811
    """A sweep file of runs of two batches; six for the whole test, else two."""
    folder = tmp_path_factory.mktemp("sweep")
    facts = [
        {
            "subject": name,
            "prompt": "{} was born in",
            "target_new": new,
            "target_true": "Lyon",
            "paraphrases": [f"The town of {name} is"],
            "neighborhood_prompts": ["Danielle was born in"],
        }
        for name, new in (("Zoë", "Rome"), ("José", "Oslo"), ("Basel", "Paris"), ("Apple", "Tokyo"))
    ]
    (folder / "facts.json").write_text(json.dumps(facts))
    axes: dict = {**LLAMA, "update.plan": {"values": ["even", "boundary"]}}
    if WHOLE:
        axes["seed_everything"] = {"values": [0, 1, 2]}
    path = write(folder, axes)
    small = [*flags(small_run, "llama3"), f"--data.path={folder / 'facts.json'}"]
    changed = ("--run.root", "--data.edits", "--run.export")
    args = [flag for flag in small if not flag.startswith(changed)]
    steps = ["--data.edits=4", "--data.batch_size=2", "--model.target.steps=8"]
    return path, [*args, *steps, "--run.export=false"]


def run_files(folder: Path, name: str) -> dict[str, object]:
    """What a run has measured, without what it cost and without where it is kept.

    A run that was killed before its first checkpoint may read the targets that it had kept by then.
    """
    summary = json.loads((folder / name / "summary.json").read_text())
    edits = (folder / name / "edits.jsonl").read_text()
    cost = ("seconds/", "edits/targets_read")
    kept = {key: value for key, value in summary.items() if not key.startswith(cost)}
    return {**kept, "edits": edits}


@pytest.fixture(scope="module")
def uninterrupted(small_sweep, tmp_path_factory):
    """Every run of the sweep by `fit`, one after the other, nothing shared but the covariance."""
    root = tmp_path_factory.mktemp("uninterrupted")
    path, args = small_sweep
    runs = plan_runs(read_sweep(path), root, args)
    for run in runs:
        shared = ("--measure.unedited_cache", SHARE_TARGETS)
        alone = [arg for arg in run.command if not arg.startswith(shared)]
        with redirect_stdout(io.StringIO()):
            assert main(alone) == 0
    return root / "sweep"


def sweep_command(small_sweep, root: Path) -> list[str]:
    path, args = small_sweep
    return ["sweep", str(path), *args, f"--root={root}", "--jobs=2" if WHOLE else "--jobs=1"]


def processes(root: Path) -> list[int]:
    """The processes that hold the locks of a sweep, as they have noted."""
    pids = [(root / "sweep").glob("locks/*.lock")]
    noted = [file.read_text().strip() for files in pids for file in files]
    return [int(pid) for pid in noted if pid]


def wait_for(what, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + LIMIT
    while not what() and time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            return
        time.sleep(0.05)


def table(folder: Path, tmp_path: Path) -> list[dict[str, str]]:
    output = tmp_path / f"comparison-{folder.parent.name}"
    with redirect_stdout(io.StringIO()):
        assert main(["compare", str(folder), f"--output={output}"]) == 0
    with (output / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def check_same(root: Path, uninterrupted: Path, tmp_path: Path) -> None:
    names = [file.parent.name for file in uninterrupted.glob("*/summary.json")]
    assert len(names) == (6 if WHOLE else 2)
    for name in names:
        assert run_files(root / "sweep", name) == run_files(uninterrupted, name), name
    assert table(root / "sweep", tmp_path) == table(uninterrupted, tmp_path)


def test_a_run_that_decides_its_layers_is_the_one_that_was_asked_for(small_sweep, tmp_path):
    path, args = small_sweep
    open_ = ["--update.layers=null", "--model.target.steps=1", "--data.edits=1"]
    run = plan_runs(read_sweep(path), tmp_path, [*args, *open_])[0]
    with redirect_stdout(io.StringIO()):
        assert main(run.command) == 0
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert written["update"]["layers"]
    assert run.state == "finished"


@pytest.mark.skipif(WHOLE, reason="the whole test kills the sweep itself")
def test_a_sweep_whose_run_was_killed_goes_on_to_the_same_table(
    small_sweep, uninterrupted, tmp_path, capsys
):
    """One run is killed behind its first batch; the next sweep goes on with it, and is skipped
    by the one after that."""
    command = sweep_command(small_sweep, tmp_path)

    def kill() -> None:
        wait_for(lambda: list(tmp_path.glob("sweep/even-*/checkpoints/batch-00001.ckpt")))
        for pid in processes(tmp_path):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    (tmp_path / "sweep").mkdir()
    code = main([*command, "update.plan=even"])
    killer.join()
    said = capsys.readouterr().out
    assert code == 1, said
    assert "killed by signal 9" in said
    assert "without a result: 1 of 1 run;" in said
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 runs: 1 stopped, 1 new; 1 at a time" in said
    assert said.count("finished") == 2
    check_same(tmp_path, uninterrupted, tmp_path)
    assert len(list(tmp_path.glob("sweep/unedited/*.json"))) == 1
    capsys.readouterr()
    assert main(command) == 0
    assert "2 runs: 2 finished, 0 new" in capsys.readouterr().out


@pytest.mark.skipif(not WHOLE, reason="make sweepkill; minutes")
def test_a_sweep_that_is_killed_goes_on_to_the_same_table(small_sweep, uninterrupted, tmp_path):
    """Killed three times with all its runs, once alone: then its runs go on, and are waited for."""
    command = [sys.executable, "-m", "lightning_blue", *sweep_command(small_sweep, tmp_path)]
    for number in range(KILLS):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wanted = 2 * number + 1  # checkpoints of different runs, ever more of them
        wait_for(
            lambda wanted=wanted: (
                len(list(tmp_path.glob("sweep/*/checkpoints/batch-00001.ckpt"))) >= wanted
            ),
            process,
        )
        process.kill()
        process.communicate()
        if number:  # the first time, the runs survive their sweep
            for pid in processes(tmp_path):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    check_same(tmp_path, uninterrupted, tmp_path)


def test_a_sweep_that_cannot_be_run_is_one_message(tmp_path, capsys):
    assert main(["sweep", str(tmp_path / "none.yaml")]) == 2
    assert "no such sweep file" in capsys.readouterr().err
    path = write(tmp_path, {**LLAMA, "update.plan": {"values": ["evn"]}})
    assert main(["sweep", str(path), f"--root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "boundary" in error
    assert "Traceback" not in error
    assert main(["sweep", str(path), "--slurm", "time=3", "--jobs=0"]) == 2
    assert "hint" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
