"""The files in deploy/ fit the command they run."""

import configparser
from pathlib import Path

import typer
import typer.main

from greenroom.commands import serve

DEPLOY = Path(__file__).parents[2] / "deploy"


def parameters(*arguments: str) -> dict:
    app = typer.Typer()
    app.command()(serve.serve)
    with typer.main.get_command(app).make_context("serve", [*arguments]) as context:
        return dict(context.params)


def test_example_settings_are_understood(tmp_path):
    found = parameters("--config", str(DEPLOY / "greenroom.toml"))
    assert found["log_format"] == "json"
    # The lines that are commented out, too.
    lines = (DEPLOY / "greenroom.toml").read_text().splitlines()
    full = [line.removeprefix("# ") for line in lines if " = " in line]
    (tmp_path / "all.toml").write_text("\n".join(full))
    found = parameters("--config", str(tmp_path / "all.toml"))
    assert list(found["allowed_host"]) == ["models.example.org"]


def test_unit_waits_longer_than_the_drain():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "greenroom.service")
    drain = parameters("--config", str(DEPLOY / "greenroom.toml"))["drain_seconds"]
    assert float(unit["Service"]["TimeoutStopSec"]) > drain


def test_image_sets_variables_that_exist():
    text = (DEPLOY / "Dockerfile").read_text()
    names = {p.envvar for p in _options()}
    set_there = [w for w in text.replace("=", " ").split() if w.startswith("GREENROOM_")]
    assert {name for name in set_there if name.isupper()} <= names


def _options() -> list:
    app = typer.Typer()
    app.command()(serve.serve)
    return [p for p in typer.main.get_command(app).params if p.param_type_name == "option"]
