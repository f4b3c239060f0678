"""The operators' API: REST with an OpenAPI document, bearer tokens with roles, an event stream."""
