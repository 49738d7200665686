//! nginx, in the middle of a download.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, ensure};
use integration::programs::Installed;
use integration::two_nets::TwoNets;

use super::http::{Connection, Download, write_file};
use super::service::{Order, Service, on_hosts, takes_other_users};

/// A directory with a site in it, and what nginx keeps beside it.
fn site() -> Result<tempfile::TempDir> {
    let directory = tempfile::Builder::new().prefix("migr-nginx-").tempdir()?;
    // Its workers are another user.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    write_file(&directory.path().join("file"))?;
    fs::write(directory.path().join("small"), "small")?;
    Ok(directory)
}

fn server<'n>(nets: &'n TwoNets, directory: &Path, user: &str) -> Result<Service<'n>> {
    let here = directory.display();
    let configuration = format!(
        "user {user}; daemon off; worker_processes 2; pid {here}/pid; error_log stderr;\n\
         events {{}}\n\
         http {{ access_log off; sendfile on; keepalive_timeout 600;\n\
         client_body_temp_path {here}/body; proxy_temp_path {here}/proxy;\n\
         fastcgi_temp_path {here}/fastcgi; uwsgi_temp_path {here}/uwsgi;\n\
         scgi_temp_path {here}/scgi;\n\
         server {{ listen 80; root {here}; }} }}\n"
    );
    let file = directory.join("nginx.conf");
    fs::write(&file, configuration)?;
    let program = Installed::find("usr/sbin/nginx")?;
    let order = Order {
        name: "nginx",
        address: "10.98.0.61:80",
        program: &program,
        before: &[],
        args: &["-c", &file.display().to_string(), "-p", &here.to_string()],
        env: &[],
    };
    Service::start(nets, &order)
}

/// A download goes on through moves, and its connection after it.
fn moves(mut nginx: Service<'_>, directory: &Path) -> Result<()> {
    let download = Connection::new(nginx.connect()?);
    let download = Download::start(download, "/file", &directory.join("file"))?;
    download.goes_on()?;
    nginx.there_and_back(|| download.goes_on())?;
    let mut connection = download.finish()?;
    ensure!(connection.ask("GET", "/small", b"")? == b"small");
    // A master and two workers.
    ensure!(nginx.processes()?.len() == 3, "{:?}", nginx.processes());
    drop(connection);
    nginx.end()
}

#[test]
fn nginx_moves_in_the_middle_of_a_download_that_arrives_whole() -> Result<()> {
    on_hosts(|nets| {
        let directory = site()?;
        moves(server(nets, directory.path(), "root")?, directory.path())
    })
}

#[test]
fn nginx_whose_workers_are_another_user_moves_where_migrd_may_or_is_refused_by_name() -> Result<()>
{
    on_hosts(|nets| {
        let directory = site()?;
        let nginx = server(nets, directory.path(), "nobody nogroup")?;
        if takes_other_users(nets)? {
            return moves(nginx, directory.path());
        }
        let mut connection = Connection::new(nginx.connect()?);
        ensure!(connection.ask("GET", "/small", b"")? == b"small");
        nginx.is_refused("other-user")?;
        ensure!(connection.ask("GET", "/small", b"")? == b"small");
        nginx.end()
    })
}
