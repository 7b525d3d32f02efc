"""What a report says: nothing unknown is ok, everything broken has its remedy."""

import json

from treepo_trl.apps.doctor.findings import BrokenError, CannotRunError, Finding, Report, finding_of


def raising(error: Exception) -> str:
    raise error


def test_each_end_of_a_check() -> None:
    remedy = "Ask."
    assert finding_of("a", lambda: "seen", remedy).status == "ok"
    unknown = finding_of("b", lambda: raising(CannotRunError("no card")), remedy)
    assert (unknown.status, unknown.detail, unknown.remedy) == ("cannot run", "no card", None)
    broken = finding_of("c", lambda: raising(BrokenError("It is off.", "Turn it on.")), remedy)
    assert (broken.status, broken.detail, broken.remedy) == ("broken", "It is off.", "Turn it on.")


def test_a_librarys_error_is_the_cause_by_its_last_line() -> None:
    found = finding_of("d", lambda: raising(RuntimeError("Traceback\n  much\nno kernel image\n\n")), "Update.")
    assert (found.status, found.detail, found.remedy) == ("broken", "RuntimeError: no kernel image", "Update.")
    assert finding_of("e", lambda: raising(KeyError()), "Update.").detail == "KeyError: no message"


def test_only_something_broken_is_a_failure() -> None:
    ok, unknown = Finding("a", "ok", "seen"), Finding("b", "cannot run", "no card")
    healthy = Report({"torch": "2"}, [ok, unknown])
    assert healthy.exit_status == 0
    assert healthy.text().splitlines()[-1] == "Nothing is broken. Not shown here: b."
    broken = Report({"torch": "2"}, [ok, unknown, Finding("c", "broken", "It is off.", "Turn it on.")])
    assert broken.exit_status == 1
    assert broken.text().splitlines()[-1] == "Broken: c. Not shown here: b."
    assert "-> Turn it on." in broken.text()


def test_the_report_is_json() -> None:
    report = Report({"torch": "2"}, [Finding("c", "broken", "It is off.", "Turn it on.", 1.5)])
    read = json.loads(json.dumps(report.to_dict()))
    check = {"check": "c", "status": "broken", "detail": "It is off.", "remedy": "Turn it on.", "seconds": 1.5}
    assert read == {"environment": {"torch": "2"}, "checks": [check], "exit_status": 1}


def test_of_cudas_error_the_first_line_is_the_cause() -> None:
    text = "CUDA error: out of memory\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `DSA`."
    assert finding_of("f", lambda: raising(RuntimeError(text)), "").detail == "RuntimeError: CUDA error: out of memory"
