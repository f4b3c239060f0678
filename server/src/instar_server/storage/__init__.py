"""The truth, in a database: schema, migrations, and small repositories that work on one connection."""
