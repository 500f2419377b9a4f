"""Build the HTTP application: search, pictures, sessions, the page and the OpenAPI description."""

# No "from __future__ import annotations" here: FastAPI could not see the limits in the types of a request, and would
# leave out those fields without a word.
import random
import time
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Optional

from fastapi import Depends, FastAPI, File, Form, Path, Query, Request, Response, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartParser

from lavis_cir_plugin import __version__
from lavis_cir_plugin.core.error_messages import did_you_mean
from lavis_cir_plugin.search.answers import as_json, picture_as_json
from lavis_cir_plugin.search.originals import ChangedError, open_indexed
from lavis_cir_plugin.search.questions import WITHOUT_WEIGHT
from lavis_cir_plugin.serving import schemas
from lavis_cir_plugin.serving.guard import COOKIE, Guard, cookie_of, is_same
from lavis_cir_plugin.serving.limits import Limits
from lavis_cir_plugin.serving.opened import Opened
from lavis_cir_plugin.serving.pictures import Kept, chunks, mime_type, small_copy
from lavis_cir_plugin.serving.refusals import problem, refusal
from lavis_cir_plugin.serving.turns import Turns
from lavis_cir_plugin.serving.uploads import KINDS, check_upload

STATIC = FilePath(__file__).with_name("static")
PAGES = {
    "": ("index.html", "text/html"),
    "docs": ("docs.html", "text/html"),
    "app.css": ("app.css", "text/css"),
    "app.js": ("app.js", "text/javascript"),
    "docs.css": ("docs.css", "text/css"),
    "docs.js": ("docs.js", "text/javascript"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
"""What is served of the page, by its path; nothing else in the folder is."""

SEVERAL = ("picture", "picture_id", "weight")
"""Fields of a question that may stand in its form several times."""

LARGEST_ID = 2**63 - 1
_REFUSED = {"model": schemas.ProblemAnswer, "description": "One sentence says what is wrong and what is allowed."}
_DESCRIPTION = """Search of pictures by pictures and words: a reference picture and a text that says what to change go
in, ranked pictures come out. Every error has the form `{"error": {"code": ..., "message": ...}}`. A server that is
bound to more than this machine asks for a token: send it as `Authorization: Bearer TOKEN`."""

IndexName = Annotated[str, Path(description="of the index, as /api/v1/server lists it", max_length=255)]
PictureId = Annotated[int, Path(ge=1, le=LARGEST_ID)]


class Service:
    """What the requests share.

    Args:
        indexes: Opened indexes by name.
        limits: Limits of the server.
        token: Token that clients have to show, if any.
    """

    def __init__(self, indexes: Mapping[str, Opened], limits: Limits, token: Optional[str]) -> None:
        self.indexes, self.limits, self.token = indexes, limits, token
        self.searching = Turns(limits.searching, limits.waiting, "search")
        self.drawing = Turns(limits.drawing, limits.waiting, "picture")
        self.kept = Kept(limits.thumbnails_bytes)

    def opened(self, name: str) -> Opened:
        """Return an index by its name, or refuse the request."""
        if name not in self.indexes:
            raise refusal(404, f"there is no index {name[:100]!r}; this server has {', '.join(self.indexes)}.")
        return self.indexes[name]

    def info(self) -> dict[str, Any]:
        """Return what this server has."""
        limits = self.limits
        return {
            "version": __version__,
            "indexes": [_index_info(opened) for opened in self.indexes.values()],
            "limits": {
                "upload_bytes": limits.upload_bytes,
                "upload_pixels": limits.upload_pixels,
                "upload_kinds": list(KINDS),
                "pictures": limits.pictures,
                "results": limits.results,
                "text": limits.text,
                "condition": limits.condition,
            },
        }

    def search(self, name: str, question: Mapping[str, Any], pictures: list[Any]) -> dict[str, Any]:
        """Answer a question on one of the threads for it."""
        with self.opened(name).in_use() as index:
            begin = time.perf_counter()
            try:
                answer = index.search(pictures, **question)
            except ValueError as error:
                raise refusal(422, str(error)) from None
            seconds = time.perf_counter() - begin
            return {"index": name, **as_json(answer), "milliseconds": round(1000 * seconds, 1)}

    def picture(self, name: str, picture_id: int) -> Any:
        """Return a picture of an index, or refuse the request."""
        with self.opened(name).in_use() as index:
            picture = index.picture(picture_id)
        if picture is None:
            raise refusal(404, f"the index has no picture {picture_id}; take an id from its results.")
        return picture

    def copy(self, name: str, picture_id: int, side: int, known: Optional[str]) -> tuple[str, Optional[bytes]]:
        """Return the entity tag of a small copy, and the copy, drawn if it is not kept; none if the tag is known."""
        picture = self.picture(name, picture_id)
        tag = f'"{picture.sha256[:32]}-{side}"'
        if tag == known:
            return tag, None
        key = (picture.sha256, side)
        content = self.kept.get(key)
        if content is None:
            content = small_copy(picture, side)
            self.kept.put(key, content)
        return tag, content

    def file(self, name: str, picture_id: int) -> tuple[Any, Any, str]:
        """Return a picture, its open file and its type."""
        picture = self.picture(name, picture_id)
        file = open_indexed(picture)
        return picture, file, mime_type(file)

    def sample(self, name: str, count: int, seed: Optional[int]) -> dict[str, Any]:
        """Return some pictures of an index, drawn at random, one of each content."""
        with self.opened(name).in_use() as index:
            live = index.gallery.live  # the rows that pictures still have; none says that all have
            total = index.manifest.rows if live is None else len(live)
            rows = random.Random(seed).sample(range(total), min(total, count))
            rows = rows if live is None else live[rows].tolist()
            found = [pictures[0] for pictures in index.catalogue.of_rows(rows).values()]
        return {"pictures": [picture_as_json(picture) for picture in found]}


def _index_info(opened: Opened) -> dict[str, Any]:
    with opened.in_use() as index:
        own = index.catalogue.own_columns
        columns = [
            {"name": name, "kind": "number" if column.is_number else "text", "own": name in own}
            for name, column in index.catalogue.columns.items()
        ]
        return {"name": opened.name, "pictures": len(index), "model": index.manifest.name, "columns": columns}


def create_app(
    indexes: Mapping[str, Opened],
    limits: Optional[Limits] = None,
    token: Optional[str] = None,
    hosts: Optional[frozenset[str]] = None,
) -> Guard:
    """Return the application behind its guard.

    Args:
        indexes: Opened indexes by name.
        limits: Limits of the server; `Limits` by default.
        token: Token that clients have to show; none where everybody who reaches the server may ask.
        hosts: Names by which the server is reached; none for all.
    """
    limits = limits or Limits()
    # A part beyond this size would be written to a temporary file; so large a body never comes this far.
    MultiPartParser.spool_max_size = limits.body_bytes + 1
    app = FastAPI(
        title="lavis_cir_plugin search",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # FastAPI's own pages load their scripts from another host
        redoc_url=None,
        responses={code: _REFUSED for code in (401, 403, 404, 413, 422, 503)},
    )
    service = Service(indexes, limits, token)
    _add_errors(app)
    _add_session(app, service)
    _add_search(app, service)
    _add_pictures(app, service)
    _add_pages(app)
    guard = Guard(app, limits, token, hosts)
    guard.service = service  # type: ignore[attr-defined]
    return guard


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return JSONResponse(problem(error.status_code, str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(ChangedError)
    async def changed(request: Request, error: ChangedError) -> JSONResponse:
        return JSONResponse(problem(409, str(error)), 409)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or "the request"
        return JSONResponse(problem(422, f"{where}: {str(first['msg']).rstrip('.')}."), 422)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(problem(500, "the server failed; its log says why."), 500)


def _add_session(app: FastAPI, service: Service) -> None:
    @app.get("/api/v1/session", response_model=schemas.Session, tags=["session"])
    async def session(request: Request) -> dict[str, bool]:
        """Say whether the server asks for a token, and whether this client has shown it."""
        cookie = request.cookies.get(COOKIE, "")
        signed_in = service.token is None or is_same(cookie, cookie_of(service.token))
        return {"open": service.token is None, "signed_in": signed_in}

    @app.post("/api/v1/session", response_model=schemas.Session, tags=["session"])
    async def sign_in(body: schemas.Token, request: Request, response: Response) -> dict[str, bool]:
        """Open a session for the page: the token becomes a cookie that scripts cannot read."""
        if service.token is not None:
            if not is_same(body.token.strip(), service.token):
                raise refusal(401, "this is not the server's token; take it from where the server was started.")
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, cookie_of(service.token), httponly=True, samesite="strict", secure=secure)
        return {"open": service.token is None, "signed_in": True}

    @app.get("/api/v1/server", response_model=schemas.ServerInfo, tags=["search"])
    async def server() -> dict[str, Any]:
        """List the indexes with their columns, and the limits of requests."""
        return await service.drawing.run(service.info)


async def _check_fields(request: Request) -> None:
    """Refuse what FastAPI would leave out without a word, and what it would take one of without a word."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("", "multipart/form-data", "application/x-www-form-urlencoded"):
        raise refusal(415, f"a question is sent as a form (multipart/form-data), not as {kind[:100]}.")
    if request.query_params:
        name = next(iter(request.query_params))
        raise refusal(422, f"{name[:100]!r} stands in the address, where it is not read; send it in the form.")
    known = [field.alias for field in request.scope["route"].dependant.body_params]
    names = [name for name, _ in (await request.form()).multi_items()]
    for name in names:
        if name not in known:
            near = did_you_mean(name, known)
            raise refusal(422, f"a question has no field {name[:100]!r}, its fields are {', '.join(known)}{near}")
        if names.count(name) > 1 and name not in SEVERAL:
            raise refusal(422, f"{name} stands in the form {names.count(name)} times; it is taken once.")


def _add_search(app: FastAPI, service: Service) -> None:
    limits = service.limits
    checks = [Depends(_check_fields)]

    @app.post("/api/v1/indexes/{index}/search", response_model=schemas.AnswerInfo, tags=["search"], dependencies=checks)
    async def search(
        index: IndexName,
        picture: Annotated[
            Optional[list[UploadFile]],
            File(description="reference pictures as files; they are kept nowhere"),
        ] = None,
        picture_id: Annotated[
            Optional[list[int]],
            Form(description="references by their ids in this index, behind the files"),
        ] = None,
        text: Annotated[str, Form(max_length=limits.text, description="the change, or what to look for")] = "",
        k: Annotated[int, Form(ge=1, le=limits.results, description="how many results")] = 24,
        image_weight: Annotated[
            float, Form(ge=0, le=1, description="0: the text alone, 0.5: what the model makes of both, 1: the pictures")
        ] = 0.5,
        weight: Annotated[
            Optional[list[float]],
            Form(description="one for each reference, > 0; equal ones by default"),
        ] = None,
        without: Annotated[str, Form(max_length=limits.text, description="what results should not show")] = "",
        without_weight: Annotated[float, Form(ge=0, le=100)] = WITHOUT_WEIGHT,
        where: Annotated[
            str, Form(max_length=limits.condition, description="such as: price < 50 and brand = 'x'")
        ] = "",
        min_score: Annotated[Optional[float], Form(ge=-1, le=1)] = None,
        fold: Annotated[bool, Form(description="show one of several near-duplicates")] = True,
        keep_references: Annotated[bool, Form(description="also find the references' own files")] = False,
        exact: Annotated[bool, Form(description="scan everything, though the index has candidates")] = False,
    ) -> dict[str, Any]:
        """Search an index by pictures, a text, or both."""
        service.opened(index)
        files, ids = picture or [], picture_id or []
        if len(files) + len(ids) > limits.pictures:
            raise refusal(422, f"there are {len(files) + len(ids)} references; at most {limits.pictures} are taken.")
        if not all(1 <= number <= LARGEST_ID for number in ids):
            raise refusal(422, f"picture_id: {ids} are no ids; take them from the results of this index.")
        contents = [await file.read() for file in files]
        question = {
            "text": text,
            "k": k,
            "image_weight": image_weight,
            "weights": weight or None,
            "without": without,
            "without_weight": without_weight,
            "where": where,
            "min_score": min_score,
            "fold": fold,
            "keep_references": keep_references,
            "exact": exact,
        }

        def check() -> None:
            for content in contents:
                check_upload(content, limits)

        if contents:  # by the threads for pictures: what is none need not wait behind other people's searches
            await service.drawing.run(check)
        return await service.searching.run(lambda: service.search(index, question, [*contents, *ids]))

    @app.get("/api/v1/indexes/{index}/sample", response_model=schemas.Sample, tags=["search"])
    async def sample(
        index: IndexName,
        count: Annotated[int, Query(ge=1, le=100)] = 12,
        seed: Annotated[Optional[int], Query(description="the same pictures for the same seed")] = None,
    ) -> dict[str, Any]:
        """Draw pictures of an index at random, to begin with one of them."""
        return await service.drawing.run(lambda: service.sample(index, count, seed))


def _add_pictures(app: FastAPI, service: Service) -> None:
    place = "/api/v1/indexes/{index}/pictures/{picture_id}"

    @app.get(place, response_model=schemas.PictureInfo, tags=["pictures"])
    async def picture(index: IndexName, picture_id: PictureId) -> dict[str, Any]:
        """Say what the index knows of a picture."""
        return picture_as_json(await service.drawing.run(lambda: service.picture(index, picture_id)))

    @app.get(f"{place}/thumbnail", response_class=Response, tags=["pictures"], responses={200: _content("image/jpeg")})
    async def thumbnail(
        request: Request, index: IndexName, picture_id: PictureId, side: schemas.Side = schemas.Side.MEDIUM
    ) -> Response:
        """Return a small copy as JPEG, upright."""
        known = request.headers.get("if-none-match")
        tag, content = await service.drawing.run(lambda: service.copy(index, picture_id, side.value, known))
        # Another index may stand under this address tomorrow, so a browser has to ask each time.
        headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
        if content is None:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type="image/jpeg", headers=headers)

    @app.get(f"{place}/file", response_class=StreamingResponse, tags=["pictures"], responses={200: _content("image/*")})
    async def file(index: IndexName, picture_id: PictureId) -> StreamingResponse:
        """Return the file itself, if it still is what was indexed."""
        found, opened, kind = await service.drawing.run(lambda: service.file(index, picture_id))
        suffix = FilePath(found.path).suffix
        # The name may hold anything; the number says as much, and fits into a header.
        name = f"{picture_id}{suffix if suffix[1:].isalnum() and suffix.isascii() else ''}"
        headers = {"Content-Disposition": f'inline; filename="{name}"', "Content-Length": str(found.bytes)}
        return StreamingResponse(chunks(opened), media_type=kind, headers=headers)


def _content(kind: str) -> dict[str, Any]:
    return {"content": {kind: {"schema": {"type": "string", "format": "binary"}}}, "description": "The picture."}


def _add_pages(app: FastAPI) -> None:
    def add(path: str, name: str, kind: str) -> None:
        async def page() -> FileResponse:
            return FileResponse(STATIC / name, media_type=kind, headers={"Cache-Control": "no-cache"})

        app.add_api_route(f"/{path}", page, methods=["GET", "HEAD"], include_in_schema=False)

    for path, (name, kind) in PAGES.items():
        add(path, name, kind)
