"""The engine of workflows: caching by key, resuming, choices, patches and their effects, all of it in the log."""

from dataclasses import replace

import pytest

from attribution.bodies import WorkflowEffectBody, WorkflowRunBody
from attribution.lineage import Lineage, record_bundle
from attribution.questions import ask_improved
from attribution.trail import Trail
from attribution.workflow_effects import recorded_effects
from attribution.workflow_patches import recorded_patches
from attribution.workflow_runs import Run, StepRun, record_run, recorded_runs
from cluster.workflow import Author
from cluster.workflow_journal import Journal
from cluster.workflow_plan import Choice
from configs.errors import UserError
from pipelines.contribute import add_contributor
from tests.cluster.workflow_world import UNSIGNED, World

ALL = ["refine", "train", "benchmark"]
SLOWER = UNSIGNED.replace("learning_rate: 0.5", "learning_rate: 0.1")
MIRA = Author("mira", "a lower rate")


@pytest.fixture
def world(trail: Trail) -> World:
    return World(trail)


def statuses(run: Run) -> dict[str, str]:
    return {step.name: step.status for step in run.steps}


def test_a_second_run_does_nothing_and_records_nothing(world: World) -> None:
    first = world.driver().run()
    assert first.is_new and first.run.status == "done" and world.made == ALL
    size = world.trail.log.size
    second = world.driver().run()
    assert not second.is_new and world.made == ALL and world.trail.log.size == size
    assert set(statuses(second.run).values()) == {"reused"}
    assert world.trail.registry.resolve("facts").version == 1


def test_the_record_names_steps_and_has_what_they_made_as_parents(world: World) -> None:
    run = world.driver().run().run
    entry = world.trail.entry(run.leaf_hash)
    assert entry.record is not None and isinstance(entry.record.body, WorkflowRunBody)
    made = [leaf for step in run.steps for leaf in step.records]
    assert [world.trail.entry(leaf).leaf.kind for leaf in entry.leaf.parents] == [
        "refinement",
        "adapter",
        "benchmark",
        "publication",
    ]
    assert list(entry.leaf.parents) == made
    adapter = run.step("train").outputs[0].artefact.digest  # type: ignore[union-attr]
    assert any(line.startswith("train done key=") and adapter in line for line in entry.record.body.steps)
    assert recorded_runs(world.trail) == [run]


def test_what_changed_is_run_again_and_the_reason_names_it(world: World) -> None:
    world.driver().run()
    world.rows = "other rows"
    plan = {decision.name: (decision.action, decision.why) for decision in world.driver().plan()}
    assert plan["refine"][0] == "run" and plan["refine"][1].startswith("inputs: contribution rows ")
    assert plan["train"] == ("run", "needs what refine will make")


def test_a_setting_and_a_seed_are_named_when_they_differ(world: World) -> None:
    world.driver().run()
    decisions = world.driver(SLOWER, overrides=["seed=7"]).plan()
    why = {decision.name: decision.why for decision in decisions}
    assert why["refine"] == "nothing it depends on has changed"
    assert why["train"] == "config: learning_rate 0.5 -> 0.1, seed 0 -> 7; seed 0 -> 7"
    assert world.made == ALL, "a dry run makes nothing"


def test_equal_output_stops_the_rerun(world: World) -> None:
    """Refining again gave the same dataset, so training stands."""
    world.driver().run()
    run = world.driver(choice=Choice("refine")).run().run
    assert world.made == [*ALL, *ALL], "--from runs all that follows"
    again = world.driver(choice=Choice(only=("refine",))).run().run
    assert statuses(again)["refine"] == "reused" and statuses(run)["refine"] == "done"


def test_a_failure_is_recorded_and_the_next_attempt_goes_on_behind_it(world: World) -> None:
    world.breaks["train"] = RuntimeError("out of memory\nat step 3")
    failed = world.driver().run().run
    assert failed.status == "failed"
    assert statuses(failed) == {"refine": "done", "train": "failed", "benchmark": "skipped", "publish": "skipped"}
    step = failed.step("train")
    assert step is not None and step.reason == "RuntimeError: at step 3" and step.trace is not None
    assert b"out of memory" in world.trail.store.get_blob(step.trace)
    why = {decision.name: decision.why for decision in world.driver().plan()}
    assert why["train"] == "failed last time: RuntimeError: at step 3"
    run = world.driver().run().run
    assert world.made == ["refine", "train", "train", "benchmark"]
    entry = world.trail.entry(run.leaf_hash)
    assert entry.record is not None
    assert (entry.record.attempt, entry.record.parent_attempt, run.run_id) == (2, failed.leaf_hash, "facts-1")


def test_independent_steps_go_on_after_a_failure(world: World) -> None:
    both = UNSIGNED.replace(
        "  benchmark:\n", "  other:\n    kind: train\n    dataset: ${refine.dataset}\n  benchmark:\n", 1
    )
    world.breaks["train"] = ValueError("no")
    run = world.driver(both).run().run
    assert statuses(run)["other"] == "done" and statuses(run)["benchmark"] == "skipped" and run.status == "failed"


def leave_behind(world: World, *, recorded: bool) -> None:
    """Leave the journal of a driver that was killed in `train`, before or after the step's record was in the log."""
    real = world.kinds()["train"].make
    driver = world.driver()

    class Killed(BaseException):
        """Nothing catches it, as nothing catches SIGKILL."""

    def make(trail, task):  # type: ignore[no-untyped-def]
        if recorded:
            real(trail, task)
        else:
            world.made.append("train")
        raise Killed

    driver._kinds = {**driver._kinds, "train": replace(driver._kinds["train"], make=make)}
    with pytest.raises(Killed):
        driver.run()


@pytest.mark.parametrize("recorded", [False, True])
def test_a_killed_driver_is_recorded_and_its_work_is_kept(world: World, recorded: bool) -> None:
    leave_behind(world, recorded=recorded)
    assert recorded_runs(world.trail) == []
    plan = {decision.name: decision.action for decision in world.driver().plan()}
    assert plan["train"] == ("reuse" if recorded else "run")
    run = world.driver().run().run
    killed, done = recorded_runs(world.trail)
    assert (killed.status, done.status, done.attempt, done.parent) == ("killed", "done", 2, killed.leaf_hash)
    assert statuses(killed) == {"refine": "done", "train": "done" if recorded else "killed"}
    assert world.made.count("refine") == 1 and world.made.count("train") == (1 if recorded else 2)
    assert run.leaf_hash == done.leaf_hash


def test_ctrl_c_is_recorded_too(world: World) -> None:
    world.breaks["train"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.driver().run()
    (run,) = recorded_runs(world.trail)
    assert run.status == "stopped" and statuses(run) == {"refine": "done", "train": "killed"}
    assert world.driver().run().run.attempt == 2


def test_two_drivers_do_not_run_one_workflow(world: World) -> None:
    with Journal(world.trail.home, "facts").locked(), pytest.raises(UserError, match=r"process \d+ runs it"):
        world.driver().run()
    assert world.driver().run().is_new


def test_only_and_from(world: World) -> None:
    with pytest.raises(UserError, match="--only train: missing input: 'refine' has no result"):
        world.driver(choice=Choice(only=("train",))).run()
    run = world.driver(choice=Choice(only=("refine",))).run().run
    assert run.status == "partial" and world.made == ["refine"]
    world.driver(choice=Choice(only=("train", "benchmark"))).run()
    assert world.made == ALL
    world.driver().run()
    run = world.driver(choice=Choice(start="benchmark")).run().run
    assert world.made == [*ALL, "benchmark"] and statuses(run)["train"] == "reused"
    assert world.trail.registry.resolve("facts").version == 1, "what is published already is not published again"
    for choice in (Choice(start="trian"), Choice(only=("trian",))):
        with pytest.raises(UserError, match="trian: no such step; did you mean 'train'"):
            world.driver(choice=choice).run()


def test_what_is_gone_from_the_store_is_made_again(world: World) -> None:
    run = world.driver().run().run
    step = run.step("train")
    assert step is not None
    world.trail.store.path_of(step.outputs[0].artefact.digest).unlink()
    why = {decision.name: decision.why for decision in world.driver().plan()}
    assert why["train"] == "what it made is gone from the store"
    assert world.driver().run().run.status == "done"


def test_a_patch_needs_author_and_reason(world: World) -> None:
    world.driver().run()
    with pytest.raises(
        UserError, match=r"(?s)changed since its last run.*--as NAME --reason.*-      learning_rate: 0.5"
    ):
        world.driver(SLOWER).run()
    with pytest.raises(UserError, match="author 'mria': no such contributor"):
        world.driver(SLOWER).run(Author("mria", "why"))
    assert recorded_patches(world.trail) == [] and world.made == ALL


def test_a_patch_is_a_signed_contribution_with_its_effect(world: World) -> None:
    mira = add_contributor(world.trail, "mira")
    world.driver().run()
    run = world.driver(SLOWER).run(MIRA).run
    (patch,) = recorded_patches(world.trail, "facts")
    assert (patch.author, patch.reason) == ("mira", "a lower rate")
    assert "-      learning_rate: 0.5\n+      learning_rate: 0.1\n" in patch.diff
    (effect,) = recorded_effects(world.trail, "facts")
    assert effect.body.verdict == "improved" and effect.body.also_changed == ()
    (change,) = effect.body.changes
    assert (change.before_micro, change.after_micro, change.delta_micro) == (555_000, 155_000, -400_000)
    assert change.low_micro <= -399_999 and change.high_micro <= -399_999
    adapter = world.trail.entry(run.step("train").records[0])  # type: ignore[union-attr]
    ancestors = {entry.leaf_hash for entry in Lineage(world.trail).ancestors(adapter.leaf_hash)}
    assert {patch.leaf_hash, mira.leaf_hash} <= ancestors, "the author is an ancestor of what the patch led to"
    refined = world.trail.entry(run.step("refine").records[0])  # type: ignore[union-attr]
    assert patch.leaf_hash not in {entry.leaf_hash for entry in Lineage(world.trail).ancestors(refined.leaf_hash)}


def test_the_author_stands_in_the_offline_proof(world: World, tmp_path) -> None:  # type: ignore[no-untyped-def]
    import json

    from attribution.log.verify import Trust, verify_bytes

    add_contributor(world.trail, "mira")
    world.driver().run()
    run = world.driver(SLOWER).run(MIRA).run
    leaf = run.step("publish").records[0]  # type: ignore[union-attr]
    trust = Trust.load(world.trail.home / "trust.json")
    verified = verify_bytes(json.dumps(record_bundle(world.trail, leaf)).encode(), trust=trust)
    assert [person["name"] for person in verified.facts["contributors"]] == ["mira"]


def test_ask_improved_names_the_author(world: World) -> None:
    add_contributor(world.trail, "mira")
    world.driver().run()
    world.driver(SLOWER).run(MIRA)
    answer = ask_improved(world.trail)
    (finding,) = [item for item in answer.findings if item.subject.startswith("mira")]
    assert finding.verdict == "improved" and finding.value == pytest.approx(-0.4)
    assert recorded_patches(world.trail)[0].leaf_hash in finding.links


def test_no_measurable_effect(world: World) -> None:
    add_contributor(world.trail, "mira")
    world.driver().run()
    world.driver(overrides=["roles.reviewers=[mira]"]).run(Author("mira", "only me"))
    (effect,) = recorded_effects(world.trail)
    assert effect.body.verdict == "no measurable effect"
    assert [(change.low_micro, change.high_micro) for change in effect.body.changes] == [(0, 0)]


def test_what_else_changed_is_said(world: World) -> None:
    add_contributor(world.trail, "mira")
    world.driver().run()
    world.rows = "more rows"
    world.driver(SLOWER).run(MIRA)
    (effect,) = recorded_effects(world.trail)
    assert effect.body.also_changed == ("what goes into refine",)


def test_patches_of_failed_runs_share_the_effect_of_the_run_that_ends(world: World) -> None:
    add_contributor(world.trail, "mira")
    world.driver().run()
    world.breaks["train"] = ValueError("diverged")
    world.driver(SLOWER.replace("0.1", "9.0")).run(Author("mira", "bolder"))
    assert recorded_effects(world.trail) == []
    world.driver(SLOWER).run(Author("mira", "gentler"))
    (effect,) = recorded_effects(world.trail)
    assert effect.body.patches == tuple(patch.leaf_hash for patch in recorded_patches(world.trail))
    assert len(effect.body.patches) == 2
    world.driver().run(Author("mira", "back"))
    assert [item.body.verdict for item in recorded_effects(world.trail)] == ["improved", "worsened"]


def test_the_first_version_is_its_authors(world: World) -> None:
    add_contributor(world.trail, "mira")
    run = world.driver().run(Author("mira")).run
    (patch,) = recorded_patches(world.trail)
    assert patch.before == "" and patch.diff.startswith("--- /dev/null\n") and patch.reason == "first version"
    assert world.trail.entry(run.leaf_hash).leaf.parents[0] == patch.leaf_hash
    assert recorded_effects(world.trail) == []


def test_an_effect_that_nothing_measured_says_so(world: World) -> None:
    add_contributor(world.trail, "mira")
    bare = UNSIGNED[: UNSIGNED.index("  benchmark:")]
    world.driver(bare).run()
    world.driver(bare.replace("0.5", "0.1")).run(MIRA)
    (effect,) = recorded_effects(world.trail)
    assert isinstance(effect.body, WorkflowEffectBody)
    assert (effect.body.verdict, effect.body.reason) == ("not measured", "the workflow has no benchmark")


def test_runs_come_back_from_the_log_as_they_were(trail: Trail) -> None:
    definition = trail.store.put_blob(b"name: x")
    steps = (StepRun("refine", "refine", "failed", reason="why: because", started_us=1, ended_us=2),)
    run = Run("x", 1, 1, "failed", definition, "/x.yaml", steps, 1, 2)
    leaf = record_run(trail, run).leaf_hash
    assert recorded_runs(Trail.open(trail.home), "x") == [replace(run, leaf_hash=leaf)]
    assert recorded_runs(trail, "y") == []
