"""The workloads, in the order of the tables."""

from __future__ import annotations

from benchmarks.workloads import experts, files, host, ranks

WORKLOADS = {workload.name: workload for module in (host, ranks, files, experts) for workload in module.WORKLOADS}
