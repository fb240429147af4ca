"""Descriptions and weights of earlier formats, brought to today's.

Format 2 (version 0.1) had other class paths, one condition named by its shape alone, and a flow described field by field.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pfgm.core.configurable import renamed
from pfgm.theory.data_summary import condition_key

SUMMARY_FIELDS = ("shape", "sigma_data", "scale", "value_range", "num_classes", "levels", "dequantized")
FLOW_FIELDS = ("sigma_min", "sigma_max", "unconditional", "start")


def upgrade_checkpoint(checkpoint: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a Lightning checkpoint of format 2 as of format 3; `key` names the part that is this package's own."""
    own, flow = checkpoint[key], checkpoint[key]["flow"]
    changed = {
        "hyper_parameters": upgrade_description(checkpoint["hyper_parameters"]),
        key: {"format": 3, "flow": upgrade_flow(flow), "data": upgrade_description(own["data"])},
    }
    for name in ("state_dict", "current_model_state"):
        if name in checkpoint:
            changed[name] = upgrade_weights(checkpoint[name], flow["condition_shape"], "flow.")
    return {**checkpoint, **changed}


def upgrade_flow(flow: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a flow of format 2 with its data summary as a part of its own.

    Raises:
        ValueError: If the D of the flow is not that of its denoiser.
    """
    denoiser, shape = upgrade_description(flow["denoiser"]), flow["condition_shape"]
    if float(flow["D"]) != float(denoiser["init_args"].get("D", 1)):  # FieldDenoiser has no argument D
        raise ValueError(f"D = {flow['D']} of the flow is not that of its denoiser; use another copy")
    summary = {name: flow[name] for name in SUMMARY_FIELDS} | {"conditions": _conditions(shape)}
    summary["power_std"] = denoiser["init_args"]["power_std"]
    described = {"class_path": "pfgm.theory.DataSummary", "init_args": summary}
    return {"denoiser": denoiser, "summary": described} | {name: flow[name] for name in FLOW_FIELDS}


def upgrade_weights(weights: Mapping[str, Tensor], shape: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a flow of format 2, whose condition has `shape` or is None, under today's names."""
    names = {f"{prefix}mean": f"{prefix}summary.mean"}
    for key in _conditions(shape):
        names |= {f"{prefix}condition_{what}": f"{prefix}summary.{key}_{what}" for what in ("mean", "std")}
    return {names.get(name, name): tensor for name, tensor in weights.items()}


def upgrade_description(value: Any) -> Any:
    """Return nested descriptions of objects with today's class paths and arguments."""
    if isinstance(value, list):
        return [upgrade_description(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    found = {key: upgrade_description(item) for key, item in renamed(value).items()}
    if "condition_shape" in found:
        shape, network = found.pop("condition_shape"), "sigma_data" not in found
        found["condition_shapes" if network else "conditions"] = _conditions(shape)
    return found


def _conditions(shape: Any) -> dict[str, Any]:
    return {} if shape is None else {condition_key(shape): shape}
