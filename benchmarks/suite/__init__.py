"""What ``nox -s bench`` runs: every tactic, the floor and the peers on one GPU, side by side.

``python -m benchmarks.suite --help`` says how. A suite is a command of its own (:mod:`.suites`);
what they share is cases and results (:mod:`.cases`, :mod:`.results`), the GPU (:mod:`.gpu`),
contenders (:mod:`.contenders`) and reports (:mod:`.report`, :mod:`.plots`, :mod:`.compare`).
"""
