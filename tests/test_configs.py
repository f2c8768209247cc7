"""Run files that build on others: the order in which they count, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_blue.__main__ import main
from lightning_blue.cli.run_files import with_bases
from lightning_blue.support.errors import InputError


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def configs(*args: str) -> list[Path]:
    """The files that the parser reads, in order."""
    *found, last = with_bases(args)
    assert last == "--base=null"
    return [Path(arg.removeprefix("--config=")) for arg in found]


def test_bases_come_in_order_each_after_its_own(tmp_path):
    write(
        tmp_path,
        run="base: [model.yaml, methods/rect.yaml]",
        model="base: root.yaml",
        root="seed_everything: 1",
        methods__rect="base: ../other.yaml",
        other="seed_everything: 2",
    )
    names = ["root", "model", "methods/../other", "methods/rect", "run"]
    wanted = [tmp_path / f"{name}.yaml" for name in names]
    assert configs(f"--config={tmp_path / 'run.yaml'}") == wanted


def test_later_bases_override_earlier_ones_and_the_file_overrides_both(tmp_path, capsys):
    write(
        tmp_path,
        run="base: [one.yaml, two.yaml]\nupdate: {ridge: 3}",
        one="update: {layers: [1], ridge: 1, threshold: 0.1}",
        two="update: {ridge: 2, threshold: 0.2}",
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    update = printed["update"]
    assert (update["layers"], update["threshold"], update["ridge"]) == ([1], 0.2, 3.0)
    assert printed["base"] is None


def test_one_flag_puts_a_row_on_top_of_a_run_file(tmp_path, capsys):
    write(tmp_path, run="update: {layers: [1], ridge: 1}", row="update: {ridge: 2}")
    args = [f"--config={tmp_path / 'run.yaml'}", f"--config={tmp_path / 'row.yaml'}"]
    with pytest.raises(SystemExit):
        main(["fit", *args, "--update.plan=even", "--print_config"])
    update = yaml.safe_load(capsys.readouterr().out)["update"]
    assert (update["layers"], update["ridge"], update["plan"]) == ([1], 2.0, "even")


def test_the_installed_package_has_the_rows_of_methods_too(tmp_path, monkeypatch):
    packaged = tmp_path / "site" / "conf"
    write(packaged, quickstart="seed_everything: 1", methods__rect="update: {rect_keep: 0.4}")
    here = tmp_path / "here"
    write(here, mine="base: [conf/quickstart.yaml, conf/methods/rect.yaml]")
    monkeypatch.setattr("lightning_blue.cli.run_files.PACKAGED", packaged)
    monkeypatch.chdir(here)
    wanted = [packaged / "quickstart.yaml", packaged / "methods/rect.yaml"]
    args = ["--config", "conf/quickstart.yaml", "--config=conf/methods/rect.yaml"]
    assert configs(*args) == wanted
    assert configs("--config=mine.yaml") == [*wanted, Path("mine.yaml")]
    write(here, conf__quickstart="seed_everything: 2")
    assert configs(*args) == [Path("conf/quickstart.yaml"), wanted[1]]


def test_a_circle_is_found_however_its_files_are_spelled(tmp_path):
    write(tmp_path, sub__a="base: [../b.yaml]", b="base: sub/../sub/a.yaml")
    with pytest.raises(InputError, match="name each other"):
        with_bases([f"--config={tmp_path / 'sub/a.yaml'}"])


@pytest.mark.parametrize("base", ["{a: 1}", "[1, 2]", "7"])
def test_a_base_that_is_no_file_is_refused(base, tmp_path):
    write(tmp_path, run=f"base: {base}")
    with pytest.raises(InputError, match=r"must be a run file or a list of run files"):
        with_bases([f"--config={tmp_path / 'run.yaml'}"])


def test_a_base_that_is_missing_is_named_with_its_nearest(tmp_path):
    write(tmp_path, run="base: [methods/rekt.yaml]", methods__rect="update: {rect_keep: 0.4}")
    with pytest.raises(InputError, match=r"did you mean .*rect\.yaml"):
        with_bases([f"--config={tmp_path / 'run.yaml'}"])
