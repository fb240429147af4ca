"""Convert descriptions and weights of earlier formats to the present one.

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
    """Convert a Lightning checkpoint of format 2 to format 3; `key` names the part that is this package's own."""
    data, flow = checkpoint[key]["data"], checkpoint[key]["flow"]
    changed = {
        "hyper_parameters": upgrade_description(checkpoint["hyper_parameters"]),
        key: {"format": 3, "flow": upgrade_flow(flow), "data": upgrade_description(data)},
    }
    for name in ("state_dict", "current_model_state"):
        if name in checkpoint:
            changed[name] = upgrade_weights(checkpoint[name], flow, "flow.")
    return {**checkpoint, **changed}


def upgrade_flow(flow: Mapping[str, Any]) -> dict[str, Any]:
    """Give the description of a flow of format 2 a data summary. Raise ValueError if its D is not that of its denoiser."""
    denoiser = upgrade_description(flow["denoiser"])
    arguments = denoiser["init_args"]
    if float(flow["D"]) != float(arguments.get("D", 1)):  # FieldDenoiser has no argument D
        raise ValueError(f"D = {flow['D']} of the flow is not that of its denoiser. Use another copy.")
    summary = {name: flow[name] for name in SUMMARY_FIELDS}
    summary |= {"conditions": _conditions(flow["condition_shape"]), "power_std": arguments["power_std"]}
    described = {"class_path": "pfgm.theory.DataSummary", "init_args": summary}
    return {"denoiser": denoiser, "summary": described} | {name: flow[name] for name in FLOW_FIELDS}


def upgrade_weights(weights: Mapping[str, Tensor], flow: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Rename the tensors of `flow`, a description of format 2."""
    names = {f"{prefix}mean": f"{prefix}summary.mean"}
    for key in _conditions(flow["condition_shape"]):
        names |= {f"{prefix}condition_{what}": f"{prefix}summary.{key}_{what}" for what in ("mean", "std")}
    return {names.get(name, name): tensor for name, tensor in weights.items()}


def upgrade_description(value: Any) -> Any:
    """Give nested descriptions of objects the present class paths and arguments."""
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
