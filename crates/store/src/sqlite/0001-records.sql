-- One row: where the store stands. `sum` as in the other tables, over an empty key,
-- the revision and the bytes of `compacted`.
CREATE TABLE head (
    id        INTEGER PRIMARY KEY CHECK (id = 0),
    revision  INTEGER NOT NULL,
    compacted INTEGER NOT NULL,  -- changes up to this revision are no longer in the log
    sum       INTEGER NOT NULL
) STRICT;

-- The records as they are now.
CREATE TABLE entry (
    key     TEXT    NOT NULL PRIMARY KEY,
    version INTEGER NOT NULL,    -- revision of the last change
    value   BLOB    NOT NULL,
    sum     INTEGER NOT NULL     -- CRC-32 of key, version and value
) STRICT, WITHOUT ROWID;

-- The change log.
CREATE TABLE change (
    revision INTEGER NOT NULL,
    key      TEXT    NOT NULL,
    value    BLOB,               -- NULL: deleted
    sum      INTEGER NOT NULL,
    PRIMARY KEY (revision, key)
) STRICT, WITHOUT ROWID;
