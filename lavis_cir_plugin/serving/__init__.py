"""Search by HTTP and on a page, over the Python interface of search.

FastAPI says what requests may hold and writes the OpenAPI description from the same types; uvicorn speaks HTTP. What
both leave open stands in ``guard`` (who may ask, how large a body may be) and ``patience`` (how slow a client may be).
The page is plain HTML, CSS and JavaScript in ``static``.
"""
