"""What `reheat serve` sees of a vLLM server, in the time of an import: `python -m tests.unit.stand_in_server PORT BROKEN`.

It ends at once where the file BROKEN exists, answers GET /weight_info, and is lost in GET /hang: it accepts and never answers.
"""

import os
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

from megatron_reheat.rollout.server.guard import END_ROUTE, END_STATUS


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/hang":
            time.sleep(3600)
        self.send_response(200 if self.path == "/weight_info" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        if self.path == END_ROUTE:
            os._exit(END_STATUS)


if __name__ == "__main__":
    if os.path.exists(sys.argv[2]):
        print("no memory is left", flush=True)
        sys.exit(3)
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
