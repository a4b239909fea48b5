"""The OpenAPI document that Cog's server validates requests against.

The server reads it from `.cog/openapi_schema.json` below its working folder, where only `cog build`
writes it, and without it checks nothing at all. This module makes the same document, so that the
server outside a container behaves as it does inside.
"""

import json
import os
from pathlib import Path
from typing import Final

from audiocraft.serving.interface import Json, Module, SchemaError, Signature, title_case

COG_VERSION: Final = "0.23.1"
SCHEMA_PATH: Final = Path(".cog", "openapi_schema.json")


def write_schema(project: Path) -> Json:
    """Makes the schema of a project and writes it where Cog's server reads it.

    Args:
        project: folder of `predict.py` and, where it exists, `train.py`.

    Returns:
        The OpenAPI document.

    Raises:
        SchemaError: a source file is missing, or holds what Cog cannot read.
    """
    document = build_schema(project)
    text = json.dumps(document, indent=2, ensure_ascii=False)
    path = project / SCHEMA_PATH
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(exist_ok=True)
        # Renamed into place: a server that starts now must not read half a file.
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return document


def build_schema(project: Path) -> Json:
    """The OpenAPI document of `predict.py:Predictor` and, where it exists, `train.py:train`.

    Raises:
        SchemaError: a source file is missing, or holds what Cog cannot read.
    """
    try:
        predict = (project / "predict.py").read_text(encoding="utf-8")
    except OSError as error:
        raise SchemaError(f"{project / 'predict.py'} cannot be read: {error.strerror}.") from error
    document = _document(
        "Prediction", "Input", "Output", Module("predict.py", predict).prediction()
    )
    train = project / "train.py"
    if train.exists():
        signature = Module("train.py", train.read_text(encoding="utf-8")).training()
        _merge(document, _document("Training", "TrainingInput", "TrainingOutput", signature))
    return document


def input_schema(document: Json, *, training: bool = False) -> Json:
    """The inputs of one mode as a flat JSON schema, every `$ref` to a list of choices resolved.

    Returns:
        `{"properties": {name: {"type", "enum", "description", ...}}, "required": [...]}`, the
        properties in the order of the interface.
    """
    schemas = document["components"]["schemas"]
    component = schemas["TrainingInput" if training else "Input"]
    properties: dict[str, Json] = {}
    for name, prop in sorted(component["properties"].items(), key=lambda item: item[1]["x-order"]):
        properties[name] = {key: value for key, value in prop.items() if key != "allOf"}
        for reference in prop.get("allOf", []):
            enum = schemas[reference["$ref"].rpartition("/")[2]]
            properties[name] |= {"type": enum["type"], "enum": enum["enum"]}
    return {"properties": properties, "required": component.get("required", [])}


def _document(kind: str, input_name: str, output_name: str, signature: Signature) -> Json:
    """The whole OpenAPI document of one mode; `kind` is Prediction or Training."""
    noun = kind.lower()
    route, parameter = f"/{noun}s", f"{noun}_id"
    verb = "predict" if kind == "Prediction" else "train"
    inputs: Json = {"title": input_name, "type": "object", "properties": signature.inputs}
    if signature.required:
        inputs["required"] = signature.required
    text, moment = {"type": "string"}, {"type": "string", "format": "date-time"}
    response = {
        "input": _ref(input_name),
        "output": _ref(output_name),
        "id": text,
        "version": text,
        "created_at": moment,
        "started_at": moment,
        "completed_at": moment,
        "status": text,
        "error": text,
        "logs": text,
        "metrics": {"type": "object"},
    }
    location = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}
    schemas: Json = {
        input_name: inputs,
        output_name: signature.output,
        **signature.enums,
        f"{kind}Request": _object(f"{kind}Request", {"id": text, "input": _ref(input_name)}),
        f"{kind}Response": _object(f"{kind}Response", response),
        "Status": {
            "title": "Status",
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            "type": "string",
        },
        "HTTPValidationError": _object(
            "HTTPValidationError", {"detail": {"type": "array", "items": _ref("ValidationError")}}
        ),
        "ValidationError": {
            **_object("ValidationError", {"loc": location, "msg": text, "type": text}),
            "required": ["loc", "msg", "type"],
        },
    }
    invalid = {"422": _answer("Validation Error", _ref("HTTPValidationError"))}
    paths = {
        "/": {"get": _operation("Root", "root__get", {})},
        "/health-check": {"get": _operation("Healthcheck", "healthcheck_health_check_get", {})},
        route: {
            "post": {
                **_operation(verb.title(), f"{verb}_{noun}s_post", _ref(f"{kind}Response")),
                "description": f"Run a single {noun} on the model",
                "requestBody": {
                    "content": {"application/json": {"schema": _ref(f"{kind}Request")}}
                },
            }
        },
        f"{route}/{{{parameter}}}/cancel": {
            "post": {
                **_operation("Cancel", f"cancel_{noun}s__{parameter}__cancel_post", {}),
                "parameters": [
                    {
                        "required": True,
                        "schema": {"title": title_case(parameter), "type": "string"},
                        "name": parameter,
                        "in": "path",
                    }
                ],
            }
        },
    }
    for path in (route, f"{route}/{{{parameter}}}/cancel"):
        paths[path]["post"]["responses"] |= invalid
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": COG_VERSION},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _merge(document: Json, training: Json) -> None:
    """Adds the training document; as in Cog, what both hold is taken from the first."""
    schemas = document["components"]["schemas"]
    for name, schema in training["components"]["schemas"].items():
        if "enum" in schema and sorted(schemas.get(name, schema)["enum"]) != sorted(schema["enum"]):
            raise SchemaError(
                f"train.py: choices of input {name} must be those of predict.py, because Cog "
                "validates both against one list."
            )
        schemas.setdefault(name, schema)
    for path, item in training["paths"].items():
        document["paths"].setdefault(path, item)


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(title: str, properties: Json) -> Json:
    titled = {
        name: schema if "$ref" in schema else {"title": title_case(name), **schema}
        for name, schema in properties.items()
    }
    return {"title": title, "type": "object", "properties": titled}


def _answer(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _operation(summary: str, identifier: str, answer: Json) -> Json:
    return {
        "summary": summary,
        "operationId": identifier,
        "responses": {"200": _answer("Successful Response", answer)},
    }
