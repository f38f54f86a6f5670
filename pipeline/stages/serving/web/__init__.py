"""The service over HTTP: routes, uploads, refusals; the only importer of FastAPI and what belongs to it."""
