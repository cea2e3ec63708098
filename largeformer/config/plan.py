"""The recipe's `plan` section: the machine that is planned for, its prices, and what the result is worth.

None of it changes what a run computes.
"""

from __future__ import annotations

from largeformer.config.section import NonNegative, Positive, PositiveInt, Section


class BusinessConfig(Section):
    """For `plan --business`. Months run from the start of training; money has the unit of the prices.

    storage_gb: None counts the checkpoints that are kept. saved_gpu_hours_per_month: training that need no longer be done;
    deployment_saving_per_month: what the trained model saves, or earns, where it is used.
    """

    storage_gb: NonNegative | None = None
    storage_months: NonNegative = 12.0
    traffic_gb: NonNegative = 0.0
    staff_hours: NonNegative = 0.0
    price_per_staff_hour: NonNegative = 0.0
    saved_gpu_hours_per_month: NonNegative = 0.0
    deployment_saving_per_month: NonNegative = 0.0
    horizon_months: Positive = 12.0


class PlanConfig(Section):
    """The cluster and its prices. What is null is the preset's of `gpu`; links count one direction, a rank's share."""

    gpu: str = "h100"
    gpus_per_node: PositiveInt = 8
    memory_gib: Positive | None = None
    peak_tflops: Positive | None = None
    link_gb_per_s: Positive | None = None
    network_gbit_per_s: Positive | None = None
    watts: Positive | None = None
    host_gib_per_gpu: Positive = 224.0
    pcie_gb_per_s: Positive = 25.0
    nvme_gb_per_s: Positive = 3.0
    power_usage_effectiveness: Positive = 1.3
    price_per_gpu_hour: NonNegative | None = None
    price_per_kwh: NonNegative = 0.0
    price_per_storage_gb_month: NonNegative = 0.023
    price_per_traffic_gb: NonNegative = 0.09
    business: BusinessConfig = BusinessConfig()
