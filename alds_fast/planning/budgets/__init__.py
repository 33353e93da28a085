"""Plans within budgets: what is counted is solved at once, what is measured closes in by plans that are measured.

Here belongs the way from candidates and amounts to a solution. The exact solvers belong in allocation.
"""

from .memory import seen_in_runs, solve_shares
from .problem import PlanProblem, errors_of_layers

__all__ = ["PlanProblem", "errors_of_layers", "seen_in_runs", "solve_shares"]
