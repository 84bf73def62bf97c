"""The Hub's check of a card's YAML header, as far as a model card can fail it.

Behind `POST /api/validate-yaml`, which `ModelCard.validate()` and every commit with a `README.md` call.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

_HEADER = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"(?:[\w.-]+/)?[\w][\w.-]{0,95}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]+)?|code|multilingual")
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 afl-3.0 artistic-2.0
    bsl-1.0 bsd bsd-2-clause bsd-3-clause c-uda cc cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0
    cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    ecl-2.0 epl-1.0 epl-2.0 gemma gpl gpl-2.0 gpl-3.0 agpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 mpl-2.0 odbl ofl-1.1 osl-3.0 postgresql unlicense unknown wtfpl zlib other
"""
_RELATIONS = ("adapter", "finetune", "merge", "quantized")


class _UniqueKeyLoader(yaml.SafeLoader):
    """The Hub's parser refuses a key given twice; PyYAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicated mapping key: {sorted(repeated)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_header(content: str) -> dict[str, Any]:
    """The YAML header of a card; `{}` where there is none. Raises `yaml.YAMLError` or `ValueError`."""
    match = _HEADER.match(content)
    header = yaml.load(match.group(1), Loader=_UniqueKeyLoader) if match else None
    if header is not None and not isinstance(header, dict):
        raise ValueError("the metadata must be a mapping")
    return header or {}


def validate_card(content: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the header of a model card, in the Hub's manner: `'"license" must be one of …'`."""
    try:
        header = read_header(content)
    except (yaml.YAMLError, ValueError) as error:
        return [f"Invalid YAML metadata: {error}"], []
    if not header:
        return [], ["empty or missing yaml metadata in repo card"]
    strings = ("library_name", "pipeline_tag", "license_name", "license_link", "thumbnail")
    errors = [f'"{key}" must be a string' for key in strings if not isinstance(header.get(key, ""), str)]
    for key in ("license", "language", "datasets", "base_model", "tags", "metrics", "new_version"):
        if key in header:
            errors += _check_names(key, header[key])
    relation = header.get("base_model_relation")
    if relation is not None and relation not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    if "model-index" in header:
        errors += _check_model_index(header["model-index"])
    return errors, []


def _check_names(key: str, value: Any) -> list[str]:
    errors = []
    for index, name in enumerate(value if isinstance(value, list) else [value]):
        where = f"{key}[{index}]" if isinstance(value, list) else key
        if not isinstance(name, str) or not name:
            # YAML reads `no` (Norwegian) as false: the most common way to fail this check.
            errors.append(f'"{where}" must be a string, not {name!r}')
        elif key == "license" and name not in _LICENSES.split():
            errors.append(f'"{where}" with value {name!r} is not a known license; use "other" with "license_name"')
        elif key == "language" and not _LANGUAGE.fullmatch(name):
            errors.append(f'"{where}" with value {name!r} is not an ISO 639 code')
        elif key in ("base_model", "datasets", "new_version") and not _REPO_ID.fullmatch(name):
            errors.append(f'"{where}" with value {name!r} is not valid. Use an id from the Hub')
    return errors


def _check_model_index(index: Any) -> list[str]:
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        model = model if isinstance(model, dict) else {}
        if not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{i}].name" is required')
        results = model.get("results")
        if not isinstance(results, list):
            errors.append(f'"model-index[{i}].results" is required')
            continue
        for j, result in enumerate(results):
            errors += [f'"model-index[{i}].results[{j}].{what}' for what in _check_result(result)]
    return errors


def _check_result(result: Any) -> list[str]:
    if not isinstance(result, dict):
        return ['" must be an object']
    errors = []
    for section, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
        value = result.get(section)
        if not isinstance(value, dict) or not isinstance(value.get(key), str):
            errors.append(f'{section}.{key}" is required')
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*errors, 'metrics" must be a non-empty array']
    for k, metric in enumerate(metrics):
        if not isinstance(metric, dict) or not isinstance(metric.get("type"), str):
            errors.append(f'metrics[{k}].type" is required')
        value = metric.get("value") if isinstance(metric, dict) else None
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            errors.append(f'metrics[{k}].value" must be a value, not {value!r}')
    return errors
