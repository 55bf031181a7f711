"""Human sign-off: what is asked, who may answer, how many, and what voids an answer."""

import pytest

from attribution.approvals import Request, decide, standing
from attribution.bodies import ApprovalBody
from attribution.key_changes import revoke, rotate
from attribution.keys import SigningKey
from attribution.records import Artefact, Party
from attribution.trail import Trail, now_us
from attribution.workflow_patches import recorded_patches
from attribution.workflow_runs import Run
from cluster.workflow import Author
from cluster.workflow_story import approvals_of, waiting_request
from configs.errors import UserError
from pipelines.contribute import add_contributor
from tests.cluster.workflow_world import UNSIGNED, WORKFLOW, World


@pytest.fixture
def world(trail: Trail) -> World:
    for name in ("mira", "otto", "lena"):
        add_contributor(trail, name)
    return World(trail)


def run(world: World, text: str = WORKFLOW, author: Author | None = None) -> Run:
    return world.driver(text).run(author).run


def say(world: World, name: str, *, approve: bool = True, run_id: str = "facts") -> None:
    decide(world.trail, waiting_request(world.trail, run_id, "sign-off", name), name=name, approve=approve, note="seen")


def test_a_run_waits_until_enough_have_signed(world: World) -> None:
    waiting = run(world)
    assert waiting.status == "waiting"
    step = waiting.step("sign-off")
    assert step is not None and step.reason == "2 of mira, otto, operator must approve"
    assert not world.driver(WORKFLOW).run().is_new, "waiting on is not recorded again"
    say(world, "mira")
    assert run(world).status == "waiting"
    say(world, "operator")
    done = run(world)
    assert done.status == "done" and done.attempt == 2
    assert world.made == ["refine", "train", "benchmark"]
    approvals = [world.trail.entry(leaf) for leaf in done.step("sign-off").records]  # type: ignore[union-attr]
    made = {item.digest for item in approvals[0].record.inputs}  # type: ignore[union-attr]
    outputs = {name: step.outputs[0].artefact.digest for name in ("train", "benchmark") if (step := waiting.step(name))}
    assert made == set(outputs.values())
    assert [entry.record.contributors[0].role for entry in approvals if entry.record] == ["approver", "approver"]
    assert not world.driver(WORKFLOW).run().is_new, "an approval given once counts as long as nothing changes"


def test_approval_of_something_that_changed_does_not_count(world: World) -> None:
    run(world)
    say(world, "mira")
    say(world, "otto")
    world.rows = "rows that nobody has seen"
    again = run(world)
    assert again.status == "waiting" and again.run_id == "facts-1"
    assert again.step("sign-off").reason == "2 of mira, otto, operator must approve"  # type: ignore[union-attr]


def test_refusal_ends_it_until_they_think_again(world: World) -> None:
    run(world)
    say(world, "mira", approve=False)
    assert run(world).status == "waiting", "two others can still approve"
    say(world, "otto", approve=False)
    refused = run(world)
    assert refused.status == "refused"
    assert "mira refused (seen), otto refused (seen)" in refused.step("sign-off").reason  # type: ignore[union-attr]
    assert refused.step("publish").status == "skipped"  # type: ignore[union-attr]
    say(world, "otto")
    say(world, "operator")
    assert run(world).status == "done"


def test_only_the_approvers_own_key_counts(world: World) -> None:
    run(world)
    request = waiting_request(world.trail, "facts", "sign-off", "mira")
    lena = world.trail.keys.get("lena")
    for name in ("mira", "otto"):
        person = world.trail.keys.get(name)
        body = ApprovalBody(request.subject, "approved", f"{name} says lena")
        world.trail.record("approval", body, contributors=[Party(person.key_id, "approver")], signer=lena)
    found = standing(world.trail, request, approvers=("mira", "otto"), required=1)
    assert (found.status, found.decisions) == ("waiting", ())


def test_a_key_that_is_not_the_recorded_one_is_refused(world: World) -> None:
    run(world)
    folder = world.trail.keys.directory
    (folder / "mira.key").unlink()
    SigningKey.generate("mira").save(folder / "mira.key")
    fresh = World(Trail.open(world.trail.home))
    with pytest.raises(UserError, match="approver 'mira': wrong key"):
        say(fresh, "mira")


def test_whoever_rotated_a_key_approves_with_the_new_one_and_earlier_approvals_count(world: World) -> None:
    run(world)
    say(world, "mira")
    rotate(world.trail, "mira")
    rotate(world.trail, "otto", lost=True)
    say(world, "otto")
    assert run(world).status == "done"
    assert [(item.name, item.is_valid) for item in approvals_of(world.trail, "facts")] == [
        ("mira", True),
        ("otto", True),
    ]


def test_an_operators_approval_outlives_the_operators_key(world: World) -> None:
    run(world)
    say(world, "operator")
    rotate(world.trail, "operator")
    say(world, "mira")
    assert run(world).status == "done"


def test_whoever_rotated_a_key_is_the_author_of_patches_before_and_after(world: World) -> None:
    run(world, author=Author("mira", "first"))
    for rate, is_lost in (("0.1", False), ("0.2", True)):
        rotate(world.trail, "mira", lost=is_lost)
        run(world, WORKFLOW.replace("0.5", rate), Author("mira", rate))
    assert [(patch.author, patch.reason) for patch in recorded_patches(world.trail)] == [
        ("mira", "first"),
        ("mira", "0.1"),
        ("mira", "0.2"),
    ]


def test_approvals_of_a_revoked_key_do_not_count_from_the_time_given(world: World) -> None:
    run(world)
    say(world, "mira")
    stolen_us = now_us()
    say(world, "otto")
    rotate(world.trail, "otto")
    revoke(world.trail, "otto", reason="laptop stolen", from_us=stolen_us)
    waiting = run(world)
    assert waiting.status == "waiting"
    reason = waiting.step("sign-off").reason  # type: ignore[union-attr]
    assert "what otto said does not count (record" in reason and "laptop stolen" in reason
    assert [(item.name, item.is_valid) for item in approvals_of(world.trail, "facts")] == [
        ("mira", True),
        ("otto", False),
    ]
    with pytest.raises(UserError, match="trailmark key rotate 'otto' --lost"):
        say(world, "otto")
    rotate(world.trail, "otto", lost=True)
    say(world, "otto")
    assert run(world).status == "done"


@pytest.mark.parametrize(
    ("run_id", "step", "name", "message"),
    [
        ("facts", "sign-off", "mria", "approver 'mria': no such contributor; did you mean 'mira'"),
        ("facts", "sign-off", "lena", "approver 'lena': step 'sign-off' asks mira, otto, operator"),
        ("facts", "signoff", "mira", "no such approval step; did you mean 'sign-off'"),
        ("facts", "train", "mira", "no such approval step"),
        ("fact", "sign-off", "mira", "run 'fact': no such workflow or run; did you mean 'facts'"),
        ("facts-2", "sign-off", "mira", "run 'facts-2': no such workflow or run; did you mean 'facts-1'"),
    ],
)
def test_mistakes_of_an_approver_are_named(world: World, run_id: str, step: str, name: str, message: str) -> None:
    run(world)
    with pytest.raises(UserError, match=message):
        waiting_request(world.trail, run_id, step, name)


def test_an_older_run_cannot_be_approved(world: World) -> None:
    run(world)
    run(world, WORKFLOW.replace("0.5", "0.1"), Author("mira", "slower"))
    with pytest.raises(UserError, match="run facts-1: facts-2 came after it"):
        waiting_request(world.trail, "facts-1", "sign-off", "mira")
    say(world, "mira", run_id="facts-2")


def test_a_step_that_is_done_asks_for_nothing(world: World) -> None:
    run(world)
    say(world, "mira")
    say(world, "otto")
    run(world)
    with pytest.raises(UserError, match="asks for nothing now: it is done in facts-1"):
        waiting_request(world.trail, "facts", "sign-off", "mira")


def test_unknown_approvers_and_too_many_required_are_told_before_anything_runs(world: World) -> None:
    for text, message in (
        (
            WORKFLOW.replace("otto", "ottto"),
            r"steps\.sign-off\.approvers 'ottto': no such contributor; did you mean 'otto'",
        ),
        (WORKFLOW.replace("required: 2", "required: 4"), r"steps\.sign-off\.required = 4: only 3 approvers are named"),
    ):
        with pytest.raises(UserError, match=message):
            world.driver(text).run()
    assert world.made == []


def test_the_subject_is_the_step_and_the_digests(trail: Trail) -> None:
    one, two = (Artefact("adapter", name, "sha256:" + "ab" * 32) for name in ("a", "b"))
    assert Request("w", "s", (one,)).subject == Request("w", "s", (two,)).subject, "a name is not content"
    assert Request("w", "s", (one,)).subject != Request("w", "t", (one,)).subject


def test_what_a_revoked_operator_made_is_made_again_and_published_anew(world: World) -> None:
    first = world.driver(UNSIGNED).run().run
    made = first.step("refine")
    assert made is not None
    refined = world.trail.entry(made.records[0])
    rotate(world.trail, "operator")
    assert not world.driver(UNSIGNED).run().is_new, "a rotated key's work stands"
    revoke(world.trail, "operator", reason="leaked", from_us=refined.leaf.time_us)
    plan = {decision.name: decision for decision in world.driver(UNSIGNED).plan()}
    assert plan["refine"].action == "run" and "signed with a revoked key" in plan["refine"].why
    again = world.driver(UNSIGNED).run().run
    assert [step.status for step in again.steps] == ["done"] * 4
    assert world.made == ["refine", "train", "benchmark"] * 2
    assert world.trail.registry.resolve("facts").version == 2, "the first publication counts for nothing"
    assert not world.driver(UNSIGNED).run().is_new


def test_a_run_that_a_revoked_operator_recorded_makes_nothing_known(world: World) -> None:
    """Whoever had the key may have said of a step that it made what another did."""
    first = world.driver(UNSIGNED).run().run
    late = world.trail.entry(first.leaf_hash)
    revoke(world.trail, "operator", reason="leaked", from_us=late.leaf.time_us)
    assert {decision.action for decision in world.driver(UNSIGNED).plan()} == {"run"}
    assert world.driver(UNSIGNED).run().is_new
    assert not world.driver(UNSIGNED).run().is_new
