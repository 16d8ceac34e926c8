-- What people query, for example: sqlite3 catalogue.sqlite "SELECT id, subject, dino, judge FROM pairs WHERE exported"
BEGIN;
CREATE TABLE items ( -- a pair that is to be made
    id INTEGER PRIMARY KEY, category, mood, subject, second, scene1, scene2, scene3, grid, size, caption, prompt
);
CREATE TABLE results ( -- one row an item and stage
    item INTEGER, stage TEXT, score REAL, kept INTEGER, reason TEXT, data TEXT, PRIMARY KEY (item, stage)
) WITHOUT ROWID;
CREATE TABLE settings ( -- what made a stage's results; with taxonomy, what a language model wrote
    stage TEXT, name TEXT, value TEXT, PRIMARY KEY (stage, name)
);
CREATE VIEW pairs AS SELECT items.*,
    (SELECT score FROM results WHERE item = id AND stage = 'split') AS seam,
    (SELECT score FROM results WHERE item = id AND stage = 'dino') AS dino,
    (SELECT score FROM results WHERE item = id AND stage = 'judge') AS judge,
    (SELECT score FROM results WHERE item = id AND stage = 'dino2') AS dino2,
    (SELECT score FROM results WHERE item = id AND stage = 'judge2') AS judge2,
    EXISTS (SELECT 1 FROM results WHERE item = id AND stage = 'export' AND kept) AS exported,
    EXISTS (SELECT 1 FROM results WHERE item = id AND stage = 'export2' AND kept) AS exported2,
    coalesce((SELECT group_concat(stage || ': ' || reason, '; ') FROM results WHERE item = id AND NOT kept), '') AS dropped
    FROM items;
PRAGMA user_version = 1;
COMMIT;
