"""Test all claims, or those that are named, one after the other.

python benchmarks/claims --quick            # every claim, shortened: seven minutes on two cores
python benchmarks/claims                    # every claim in full: two hours on two cores
python benchmarks/claims inversion --jobs 4 # one claim; all other options are those of a claim
"""

import sys

from catalogue import CLAIMS
from harness.command import main

if __name__ == "__main__":
    known = {claim.name: claim for claim in CLAIMS}
    names = []
    for argument in sys.argv[1:]:
        if argument.startswith("-"):
            break
        names.append(argument)
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"expected names of claims: {', '.join(known)}; got {', '.join(unknown)}")
    options = sys.argv[1 + len(names) :]
    for name in names or known:
        if status := main(known[name], options):
            sys.exit(status)
