"""The workloads, in the order of the tables."""

from __future__ import annotations

from benchmarks.workloads import host

WORKLOADS = {workload.name: workload for workload in host.WORKLOADS}
