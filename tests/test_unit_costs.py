"""One whole rehearsal of the smallest profile (slow)."""

import pytest

from helpers import rehearse, unit_costs
from helpers.config import load_profile
from helpers.projection import project


@pytest.mark.slow
def test_a_rehearsal_has_a_price_for_every_unit_and_leaves_nothing():
    cfg = load_profile("smoke")
    costs, _ = unit_costs.measure(cfg)
    table = project(cfg, costs, rehearse.price(cfg)).set_index("stage")
    assert (table["seconds"] > 0).all()
    assert table.loc["04_preferences", "tokens"] > 10_000
    assert {"answer", "pair scored", "pair trained", "adapter", "item", "judge", "persona"} <= costs.keys()
