// Counts requests, and answers each with that and what its thread pool made of its body.
const crypto = require('crypto');
const fs = require('fs');
const http = require('http');

let count = 0;
// Timers, and the threads that read files, are never idle for long.
setInterval(() => fs.readFile('/proc/self/stat', () => {}), 20);
const server = http.createServer((request, response) => {
  const parts = [];
  request.on('data', (part) => parts.push(part));
  request.on('end', () => {
    crypto.pbkdf2(Buffer.concat(parts), 'salt', 100, 16, 'sha256', (error, key) => {
      count += 1;
      const body = error ? String(error) : `${count} ${key.toString('hex')}`;
      response.setHeader('Content-Length', body.length);
      response.end(body);
    });
  });
});
server.keepAliveTimeout = 600000;
server.listen(8080);
