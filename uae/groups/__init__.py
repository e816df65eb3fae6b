"""Groups: what is compared with what, who gets which advantage, which groups are drawn again, and what the loss leaves out."""

from uae.groups.credit import Credit, Order, credit
from uae.groups.drawn import Drawn, distinct
from uae.groups.filtering import Filtering, in_varied_groups, on_any_rank

__all__ = ["Credit", "Drawn", "Filtering", "Order", "credit", "distinct", "in_varied_groups", "on_any_rank"]
