"""Whether a settlement's values follow from the coalitions it recorded: the same fit, fed from its table."""

from typing import TYPE_CHECKING

import numpy as np

from attribution.coalitions import Coalitions
from attribution.credit import RULE, CreditError, Search, measure_credit
from attribution.estimates import Array
from attribution.log.proved import VerifyError
from attribution.settlement import Settlement
from configs.schema import SettleSettings

if TYPE_CHECKING:
    from attribution.trail import Trail

TOLERANCE, ROUNDING = 1e-5, 1e-6
"""What values may differ by: sums in another order, as a part of what all players gain, or the record's rounding."""
OLDER = "; its plan does not say by which rule it was drawn and fitted: it may be an older one than this code's"


def check_values(trail: "Trail", settlement: Settlement) -> str:
    """Fit the recorded utilities again and return what was shown.

    Raises:
        VerifyError: the settings, the plan or a coalition is missing, it was settled by another rule than this code's,
            or a value is another one; the player is named.
    """
    record = trail.entry(settlement.leaf_hash).record
    where = f"settlement {settlement.leaf_hash[:16]}"
    if record is None or record.config is None or not trail.store.has(record.config):
        raise VerifyError("values", f"{where}: the settings it was made under are not in this home")
    how = SettleSettings.model_validate(trail.get_json(record.config))
    plan = trail.get_json(settlement.plan)
    if (rule := plan.get("rule", RULE)) != RULE:
        raise VerifyError(
            "values",
            f"{where}: it was drawn and fitted by rule {rule} and this code has rule {RULE}; check its values with the "
            f"code it was made with, {record.code.commit or 'which its record does not name'}",
        )
    older = "" if "rule" in plan else OLDER
    order = [(str(player["kind"]), str(player["id"])) for player in plan["players"]]
    prior = np.array(trail.get_table(plan["prior"])["gains"].to_pylist()) if plan.get("prior") else None
    rows = trail.get_table(settlement.table).to_pylist()
    cells = {row["coalition"]: row["utilities"] for row in rows}

    def recorded(coalitions: Coalitions) -> Array:
        bits = ["".join("1" if bit else "0" for bit in row) for row in coalitions]
        if missing := [name for name in bits if name not in cells]:
            raise VerifyError(
                "values", f"{where}: coalition {missing[0]}, which its seed draws, is not in its table{older}"
            )
        return np.array([cells[name] for name in bits], dtype=np.float64)

    try:
        credit = measure_credit(recorded, len(order), search=Search.of(how), prior=prior)
    except CreditError as error:
        raise VerifyError("values", f"{where}: {error}") from error
    if len(credit.coalitions) != len(rows):
        raise VerifyError("values", f"{where}: {len(rows)} coalitions recorded, {len(credit.coalitions)} follow{older}")
    allowed = max(ROUNDING, TOLERANCE * abs(settlement.full_value - settlement.empty_value))
    fitted = credit.banzhaf
    told: dict[tuple[str, str], tuple[str, float, float, float]] = {
        (one.kind, one.id): (one.name, one.value, one.low, one.high) for one in settlement.players
    }
    for place, key in enumerate(order):
        again = tuple(float(values[place]) for values in (fitted.values, fitted.low, fitted.high))
        found = told.get(key, ("missing", 0.0, 0.0, 0.0))
        if key not in told or any(abs(a - b) > allowed for a, b in zip(found[1:], again, strict=True)):
            raise VerifyError(
                "values",
                f"{where}: {found[0]}: recorded {_interval(*found[1:])}, but {_interval(*again)} follows from the "
                f"recorded coalitions{older}",
            )
    return f"values: {len(order)} players' values and intervals follow from the {len(rows)} recorded coalitions"


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.6f} ({low:.6f} to {high:.6f})"
