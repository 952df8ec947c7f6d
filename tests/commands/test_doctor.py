"""`greenroom doctor` looks, measures, saves, and says so in JSON."""

import json

from greenroom.commands import main
from greenroom.placement.calibrate import load_profile


def test_doctor_measures_and_saves(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("GREENROOM_HOME", str(tmp_path))
    assert main(["doctor", "--no-measure"]) == 0
    assert "not measured yet" in capsys.readouterr().out
    assert main(["doctor", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    saved = load_profile(next(tmp_path.glob("machine-*.json")))
    assert saved.json() == found["profile"] | {
        name: {int(k): v for k, v in found["profile"][name].items()}
        for name in ("dram", "reads", "disk", "pcie_up", "pcie_down")
    }
    assert saved.fingerprint == found["fingerprint"]
    assert saved.dram_best > 0.5
    assert 0 < saved.experts["MXFP4"] < 20 * saved.dram_best
    assert found["machine"]["processor"]["threads"] >= 1
    report = tmp_path / "report"
    assert main(["doctor", "--no-measure", "--report", str(report)]) == 0
    assert "RAM read" in capsys.readouterr().out
    assert "| RAM read, GB/s |" in (report / "doctor.md").read_text()
    assert json.loads((report / "doctor.json").read_text())["profile"] == found["profile"]
    assert str(tmp_path) not in (report / "doctor.json").read_text()


def test_a_disk_that_is_not_there_is_refused_before_measuring(tmp_path, capsys) -> None:
    assert main(["doctor", "--disk", str(tmp_path / "none")]) == 1
    assert "none: there is no such folder" in capsys.readouterr().err
