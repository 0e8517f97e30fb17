"""The OpenAPI document and its page, which needs no outside network: its parts come from an installed package."""

from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from isthmus import __version__
from isthmus.wire.version import PROBLEM_MEDIA_TYPE

_TAGS: Final = [
    {"name": "jobs", "description": "Researchers: draft a job, give it a model, start it, watch it, take the model."},
    {
        "name": "participations",
        "description": "Stewards: what is asked of your datasets; grant it, refuse it, take it back.",
    },
    {"name": "datasets", "description": "Metadata of data that workers can read, use policies, and what was released."},
    {"name": "workers", "description": "Agents beside the data: they enrol with a one-time token."},
    {
        "name": "tasks",
        "description": "What a worker does in a round: claim, heartbeat, hand in. Only outbound requests.",
    },
    {"name": "checkpoints", "description": "Models by digest."},
    {"name": "organizations", "description": "Data holders and their enrolment tokens."},
    {"name": "principals", "description": "Who holds keys."},
    {"name": "keys", "description": "API keys: scoped, expiring, rotated, revoked; secrets are shown once."},
    {"name": "events", "description": "Hash-chained records of what happened."},
    {"name": "service", "description": "Is it alive, can it work, who signs receipts."},
]

_DESCRIPTION: Final = """
**Data stays, the model moves.** Isthmus lets organizations that may not share records train a model together.

*Admins* create organizations and principals. *Workers* enrol with a one-time token and announce datasets: metadata,
never rows. *Stewards* confirm datasets, set policies and grant participations. *Researchers* draft jobs, start them and
take the model.

Every refusal is a problem document (RFC 9457) with a stable `code`; beside those that it lists, an operation may answer
`body-too-large`, `not-ready` or `internal`. Lists answer `items` and `next_cursor`. Creations
take `Idempotency-Key`. Times are RFC 3339 in UTC.
"""


def description() -> dict[str, Any]:
    """What the OpenAPI document says of the service as a whole."""
    return {
        "title": "Isthmus",
        "version": __version__,
        "summary": "A data-service platform for privacy-preserving federated learning.",
        "description": _DESCRIPTION,
        "openapi_tags": _TAGS,
        "license_info": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    }


def _under_their_own_media_type(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI describes every model as JSON; refusals are problem documents."""
    for item in document["paths"].values():
        for operation in item.values():
            for response in operation["responses"].values():
                content = response.get("content", {})
                if PROBLEM_MEDIA_TYPE in content and "application/json" in content:
                    content[PROBLEM_MEDIA_TYPE] |= content.pop("application/json")
    return document


def _assets() -> Path:
    """Swagger UI of a version that reads OpenAPI 3.1, as a package ships it; nothing of the package is imported."""
    return Path(str(distribution("fastapi-offline").locate_file("fastapi_offline/static")))


def install(app: FastAPI) -> None:
    """Describe the service, and serve the page at /docs with everything that it loads."""
    generate = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _under_their_own_media_type(generate())
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to change the document
    app.mount("/docs/assets", StaticFiles(directory=_assets()), name="docs-assets")

    @app.get("/docs", include_in_schema=False)
    async def docs(request: Request) -> HTMLResponse:
        """The OpenAPI document as a page to read and to try."""
        return get_swagger_ui_html(
            openapi_url=app.openapi_url or "/openapi.json",
            title="Isthmus: the API",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon.png",
            swagger_ui_parameters={
                "docExpansion": "list",
                "defaultModelsExpandDepth": 0,
                "filter": True,
                "tryItOutEnabled": False,
                "validatorUrl": None,  # else the page would ask a service on the internet
            },
        )
