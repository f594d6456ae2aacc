"""What holds for every card, whatever its experiment."""

import pytest
from card_checks import check_listing_is_cheap

from stiefel.papers import MODULES


@pytest.mark.parametrize("module", MODULES)
def test_listing_is_cheap(module):
    check_listing_is_cheap(module)
