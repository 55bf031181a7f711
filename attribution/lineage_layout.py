"""The tables of the lineage index, and the errors of those who ask it.

Children are kept as blocks of record numbers per parent, and edges that lead to a record with children of its own once
more as rows: a walk down takes few steps, and the many records at its end (completions above all) are read a thousand
at a time. The kinds of all records lie side by side, a byte each, to sort what was found.

    key of a block of children = parent << 24 | number of the block
"""

from configs.errors import UserError

LAYOUT = 1
SCHEMA = """
CREATE TABLE state (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    origin TEXT NOT NULL, size INTEGER NOT NULL, offset INTEGER NOT NULL, peaks BLOB NOT NULL
);
CREATE TABLE kind (code INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE record (
    id INTEGER PRIMARY KEY, leaf BLOB NOT NULL, kind INTEGER NOT NULL, time_us INTEGER NOT NULL,
    parents BLOB NOT NULL, commitment BLOB NOT NULL, label TEXT
);
CREATE INDEX record_by_leaf ON record (leaf);
CREATE TABLE kinds (block INTEGER PRIMARY KEY, codes BLOB NOT NULL);
CREATE TABLE child (key INTEGER PRIMARY KEY, ids BLOB NOT NULL);
CREATE TABLE inner_child (parent INTEGER, child INTEGER, PRIMARY KEY (parent, child)) WITHOUT ROWID;
CREATE TABLE unknown_parent (id INTEGER, leaf BLOB, PRIMARY KEY (id, leaf)) WITHOUT ROWID;
CREATE TABLE name (name TEXT, version INTEGER, role TEXT, id INTEGER, PRIMARY KEY (name, version, role, id))
WITHOUT ROWID;
CREATE TABLE digest (digest BLOB, role TEXT, id INTEGER, PRIMARY KEY (digest, role, id)) WITHOUT ROWID;
CREATE INDEX digest_of_key ON digest (id) WHERE role = 'key';
CREATE TABLE row_state (one INTEGER PRIMARY KEY CHECK (one = 1), size INTEGER NOT NULL, next_row INTEGER NOT NULL);
CREATE TABLE row (digest BLOB PRIMARY KEY, number INTEGER NOT NULL, dataset INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE kept (block INTEGER, refinement INTEGER, bits BLOB NOT NULL, PRIMARY KEY (block, refinement));
"""
TABLES = ("kind", "kinds", "record", "child", "inner_child", "unknown_parent", "name", "digest")
BLOCK_BITS = 24
BLOCK_IDS = 1000  # children in a block, 4 bytes each: it fits a page of 4096 bytes
BLOCK_CODES = 4000  # kinds in a block, a byte each
MAX_KINDS = 256
# Many per minute, with everything the graph needs in the header; their private halves are opened when one is shown.
HEADER_ONLY = frozenset({"completions", "adapter_loaded"})


class LineageError(UserError):
    """A name, digest or leaf hash that stands for no record, or for several; or a record altered on disk."""


class UnknownThing(LineageError):
    """A name, digest or leaf hash that stands for nothing."""
