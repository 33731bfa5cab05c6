"""OpenAI's `/v1/files` and `/v1/batches`: jobs of `raylm.batch` that are begun, watched and collected over HTTP.

    routes.py   the gateways' end: they forward calls and stream files, and keep nothing
    upload.py   the form that a file comes in, taken apart as it comes
    actor.py    the one actor that owns the folder and runs the jobs
    store.py    the folder: files, and an SQLite database of what there is
    checks.py   what is wrong with a batch's file, told before its job begins

A batch is in the database before its id is told, its answers are in its job's ledger, and the ids of its output files
are chosen when it is created. So whatever is killed, the actor that comes next goes on with each batch where it was.
"""
