// Taplo's language server over stdio, as Even Better TOML runs it in VS Code: the same package, on the same Node.js.
// The program `taplo` on PyPI is built without it.
"use strict";
const fs = require("node:fs");
const path = require("node:path");
const { fileURLToPath } = require("node:url");
const { TaploLsp } = require("@taplo/lsp");

const environment = {
  now: () => new Date(),
  envVar: (name) => process.env[name],
  envVars: () => Object.entries(process.env),
  stdErrAtty: () => false,
  stdin: process.stdin,
  stdout: process.stderr, // stdout is the client's
  stderr: process.stderr,
  glob: () => [],
  readFile: (file) => fs.promises.readFile(file),
  writeFile: () => Promise.reject(new Error("nothing is written")),
  urlToFilePath: (url) => fileURLToPath(url),
  isAbsolute: (file) => path.isAbsolute(file),
  cwd: () => process.cwd(),
  findConfigFile: (folder) =>
    [".taplo.toml", "taplo.toml"].map((name) => path.join(folder, name)).find((file) => fs.existsSync(file)),
  fetch: { fetch: () => Promise.reject(new Error("there is no network")), Headers, Request, Response },
};

function send(message) {
  const body = Buffer.from(JSON.stringify(message));
  process.stdout.write(`Content-Length: ${body.length}\r\n\r\n`);
  process.stdout.write(body);
}

async function main() {
  const server = await TaploLsp.initialize(environment, { onMessage: send });
  let unread = Buffer.alloc(0);
  process.stdin.on("data", (chunk) => {
    unread = Buffer.concat([unread, chunk]);
    for (;;) {
      const end = unread.indexOf("\r\n\r\n");
      const length = end < 0 ? null : /Content-Length: (\d+)/i.exec(unread.subarray(0, end).toString());
      if (length === null || unread.length < end + 4 + Number(length[1])) return;
      const message = JSON.parse(unread.subarray(end + 4, end + 4 + Number(length[1])).toString());
      unread = unread.subarray(end + 4 + Number(length[1]));
      if (message.method === "exit") process.exit(0);
      server.send(message);
    }
  });
  process.stdin.on("end", () => process.exit(0));
}

main();
