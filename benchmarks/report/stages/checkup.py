"""What `treepo-trl doctor` says."""

from benchmarks.report.cases import Case, Record, Stage


def checks(record: Record, smoke: bool) -> None:
    """A row for each check. At toy size only those that load no model: doctor has tests of its own."""
    from benchmarks.common import small_model_folder
    from treepo_trl.apps.doctor.command import command_parser, examine
    from treepo_trl.apps.doctor.environment import environment
    from treepo_trl.apps.doctor.recipe import read

    if smoke:
        record("environment", f"{len(environment())} rows")
        return
    recipe = read(command_parser(), ["--model_name_or_path", small_model_folder()])
    for finding in examine(recipe).findings:
        record(finding.check, " ".join(f"{finding.status}: {finding.detail}".replace("|", "/").split()))


DOCTOR = Stage(
    name="doctor",
    title="Doctor",
    about="The checks of `treepo-trl doctor` on SmolLM2-135M-Instruct.",
    cases=lambda smoke: [Case("checks", checks, {"smoke": smoke})],
)
