"""What clients may send: one strict pydantic model per request body, a file per API.

A field that is not named here is refused with a 400 that names it. A field whose other
values are not implemented is typed with the one value that changes nothing, so that it is
either honoured or refused, never accepted and ignored.
"""
