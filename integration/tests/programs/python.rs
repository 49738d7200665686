//! Python's own web server: a download in one connection, questions over another.

use std::fs;

use anyhow::{Result, ensure};
use integration::process::PYTHON;
use integration::programs::Installed;

use super::http::{Connection, Download, write_file};
use super::service::{Order, Service, on_hosts};

#[test]
fn pythons_web_server_moves_with_its_connections() -> Result<()> {
    on_hosts(|nets| {
        let directory = tempfile::Builder::new().prefix("migr-python-").tempdir()?;
        write_file(&directory.path().join("file"))?;
        fs::write(directory.path().join("small"), "small")?;
        let program = Installed::find(PYTHON.trim_start_matches('/'))?;
        let here = directory.path().display().to_string();
        let args = ["-m", "http.server", "8000", "--protocol", "HTTP/1.1", "--directory", &here];
        let order = Order {
            name: "python",
            address: "10.98.0.62:8000",
            program: &program,
            before: &[],
            args: &args,
            env: &[],
        };
        let mut server = Service::start(nets, &order)?;
        let mut asking = Connection::new(server.connect()?);
        let download = Connection::new(server.connect()?);
        let download = Download::start(download, "/file", &directory.path().join("file"))?;
        download.goes_on()?;
        server.there_and_back(|| {
            ensure!(asking.ask("GET", "/small", b"")? == b"small");
            download.goes_on()
        })?;
        let mut downloaded = download.finish()?;
        ensure!(downloaded.ask("GET", "/small", b"")? == b"small");
        server.end()
    })
}
