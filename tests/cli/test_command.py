"""The command itself: help, errors, completion, narrow terminals."""

from __future__ import annotations

import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import typer.main
from torch import Tensor, nn
from typer.testing import CliRunner

from inmerge_wrap import __version__, plan_merging
from inmerge_wrap.cli import app, main
from inmerge_wrap.cli.shell import say, warn
from inmerge_wrap.cli.tables import KEPT, Column, print_table
from inmerge_wrap.errors import ArgumentError, ArgumentWarning, for_command_line
from tests.cli.common import ARCH, complaint, run


def test_the_command_runs_as_a_program_and_tells_mistakes_without_a_traceback() -> None:
    command = [sys.executable, "-m", "inmerge_wrap.cli", "plan", "resnt34"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 1
    assert found.stdout == "" and "Traceback" not in found.stderr
    assert "close names: " in found.stderr and "resnet34" in found.stderr


def test_help_has_examples_for_every_command() -> None:
    assert __version__ in run("--version").stdout
    overview = run("--help").stdout
    for command in ("predict", "adapt", "evaluate", "plan", "similarity", "export"):
        assert command in overview
        text = run(command, "--help").stdout
        assert "Examples" in text and f"inmerge {command} " in text
        assert "--json" in text


def test_shell_completion_offers_models() -> None:
    assert "--install-completion" in run("--help").stdout
    result = CliRunner().invoke(
        app,
        [],
        env={
            "_INMERGE_COMPLETE": "complete_bash",
            "COMP_WORDS": "inmerge plan resnet10",
            "COMP_CWORD": "2",
        },
        prog_name="inmerge",
    )
    assert "resnet10t" in result.stdout.split()


def test_usage_errors_have_their_own_exit_code() -> None:
    assert "no-such" in run("plan", ARCH, "--no-such", code=2).stderr
    run("nothing", code=2)


SLOW = {"torch", "timm", "torchvision", "numpy", "kornia", "matplotlib", "PIL"}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("plan -h", 0),
        ("evaluate --help", 0),
        ("predict -h", 0),
        ("adapt -h", 0),
        ("predict no_such_model README.md", 1),
        ("adapt no_such_model docs --out out", 1),
        ("--version", 0),
        ("nothing", 2),
        ("plan resnet10t --no-such", 2),
        ("export only_one", 2),
        ("plan resnt34", 1),
        ("plan resnet10t --shallow-layers many", 1),
        ("plan resnet10t --input-size 3 -1 4", 1),
        ("export no_such_file out --arch resnet10t", 1),
        ("export README.md out --arch resnt34", 1),
        ("evaluate README.md --data no_such_folder", 1),
        ("evaluate README.md --data README.md --mean 127 --std 50", 1),
    ],
)
def test_help_and_mistakes_do_not_wait_for_slow_imports(line: str, code: int) -> None:
    """They took 3 to 6 seconds; how long they take now depends on what is imported alone."""
    script = (
        "import sys\n"
        "from inmerge_wrap.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('imported:', *sys.modules)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, *line.split()],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert found.returncode == code, found.stderr
    imported = found.stdout.splitlines()[-1]
    assert imported.startswith("imported: ")
    assert SLOW & {name.split(".")[0] for name in imported.split()} == set()


def test_completion_does_not_wait_for_slow_imports() -> None:
    script = (
        "import sys\n"
        "from inmerge_wrap.cli.options import complete_model\n"
        "print(*complete_model('resnet10'), *complete_model('fcn_'))\n"
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    offered, imported = done.stdout.splitlines()
    assert {"resnet10t", "fcn_resnet50"} <= set(offered.split())
    assert SLOW & {name.split(".")[0] for name in imported.split()} == set()


@pytest.mark.parametrize("width", [40, 50, 80])
def test_help_fits_any_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option name stands whole, no type follows a flag, and each example is one line."""
    monkeypatch.setenv("COLUMNS", str(width))
    group = typer.main.get_command(app)
    for name, entry in group.commands.items():  # type: ignore[attr-defined]
        if name == "train":  # its options are those of the program that it calls
            continue
        text = run(name, "--help").stdout
        assert "<" not in text and "…" not in text
        for parameter in entry.params:
            if parameter.param_type_name == "option":
                line = next(
                    line for line in text.splitlines() if line.startswith(f"  {parameter.opts[0]}")
                )
                names = [*parameter.opts, *parameter.secondary_opts]
                assert line.split(" ")[2 : 2 + len(names)] == [
                    *(f"{each}," for each in names[:-1]),
                    names[-1],
                ]
                assert len(line.split()) > len(names) or parameter.is_flag
        examples = text.partition("Examples\n")[2].rstrip().splitlines()
        assert examples[0].startswith(f"  inmerge {name} ")
        assert [shlex.split(line)[0] for line in examples] == ["inmerge"] * len(examples)


def test_an_error_names_the_argument_to_python_and_the_option_to_a_shell() -> None:
    error = ArgumentError("pass <shallow_layers=0>, <skip_broken=True> or a <size>")
    assert str(error) == "pass shallow_layers=0, skip_broken=True or a size"
    assert for_command_line(error) == "pass --shallow-layers 0, --skip-broken or a --size"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(ValueError, match=r"^also_merge must be among"):
        plan_merging(timm.create_model(ARCH), also_merge=["everything"])
    assert "error: --also-merge must be among" in complaint("plan", ARCH, "--also-merge", "x")
    with pytest.warns(ArgumentWarning, match=r"Pass example_input, as"):
        plan_merging(NeedsAMask())


class NeedsAMask(nn.Module):
    """Cannot be called with an image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(image) * mask)


def test_train_is_the_program_of_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    shown = run("train", "--help").stdout
    assert "usage: inmerge train" in shown and "--data-dir" in shown
    prose = [line for line in shown.splitlines() if not line.startswith("    ")]
    assert max(map(len, prose)) <= 50
    missing = ["--data-dir", "no-such-folder", "--weights", "none", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["inmerge", "train", *missing])
    with pytest.raises(SystemExit, match="no-such-folder"):  # a text: on stderr, and exit code 1
        main()


@pytest.mark.parametrize(
    "lost,extra", [("accelerate", True), ("inmerge_wrap.app.publishing", False)]
)
def test_an_extra_is_named_for_the_package_of_another_alone(
    lost: str, extra: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import inmerge_wrap.app

    monkeypatch.delitem(sys.modules, "inmerge_wrap.app.train", raising=False)
    monkeypatch.delattr(inmerge_wrap.app, "train", raising=False)
    monkeypatch.setitem(sys.modules, lost, None)
    told = complaint("train", "--help")
    assert lost in told and ('pip install "inmerge-wrap[app]"' in told) is extra


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets were taken for markup, and words between colons for pictures."""
    names = ["tumour [left]", "[/b]", "stage:x:a"]
    column = Column("class [all]", names, KEPT, justify="left")
    print_table("Images of runs/[old]", [column], footer="all [left]")
    say("stage:x:a of [left]")
    warn("stage:x:a of [left]")
    shown = capsys.readouterr()
    for text in [*names, "class [all]", "runs/[old]", "all [left]", "stage:x:a of [left]"]:
        assert text in shown.out
    assert "stage:x:a of [left]" in shown.err
