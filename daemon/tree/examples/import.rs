//! `import STORE ARCHIVE…`: what the engine does to import archives, without the engine: for measurements. With `.deb` files,
//! all are unpacked one upon the other. Workers are looked for in the directory of `CASEMATE_LIBEXEC`.

use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use casemate_store::{Name, Store, StoreMode};
use casemate_worker::ids::IdMode;
use casemate_worker::protocol::{Slice, TreeRequest, TreeResult, UnpackLimits, UnpackRequest, UnpackResult};
use casemate_worker::spawn::{Limits, Spawner, Worker};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, archives @ ..] = &arguments[..] else { return Err("import STORE ARCHIVE…".into()) };
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let ids = IdMode::detect(&std::env::var("USER").unwrap_or_default(), uid, gid);
    let mode = if matches!(ids, IdMode::Range { .. }) { StoreMode::Range } else { StoreMode::Single };
    let store = Store::open(Path::new(store), mode)?;
    let libexec = std::env::var("CASEMATE_LIBEXEC")?.into();
    let spawner = Spawner { libexec, ids, environment: Vec::new() };
    let limits = Limits { time: Duration::from_secs(3600), silence: Duration::from_secs(600) };
    let (_keep, cancel) = tokio::sync::watch::channel(false);

    let begin = Instant::now();
    let job: Name = format!("import-{}", std::process::id()).parse()?;
    let staging = store.staging(&job)?;
    let tree: Name = "tree".parse()?;
    let path = staging.relative(Some(&tree));
    let directory = || -> std::io::Result<Vec<OwnedFd>> {
        let null = File::options().write(true).open("/dev/null")?;
        Ok(vec![store.directory().try_clone_to_owned()?, null.into()])
    };
    let prepare = TreeRequest::Prepare { path: path.clone(), children: Vec::new() };
    let _: TreeResult =
        spawner.run(Worker::Tree, &prepare, directory()?, limits, &mut |_| (), cancel.clone()).await?;
    let prepared = begin.elapsed();

    let caps = UnpackLimits::default();
    let (input, request) = if archives.iter().all(|name| name.ends_with(".deb")) {
        let mut all = File::from(staging.spool()?);
        let mut items = Vec::new();
        let mut offset = 0;
        for name in archives {
            let bytes = std::fs::read(name)?;
            all.write_all(&bytes)?;
            items.push(Slice { name: name.clone(), offset, length: bytes.len() as u64 });
            offset += bytes.len() as u64;
        }
        (all, UnpackRequest::Packages { items, limits: caps })
    } else {
        (File::open(&archives[0])?, UnpackRequest::Image { limits: caps })
    };
    let descriptors = vec![staging.open_child(&tree)?, input.into(), staging.spool()?];
    let unpacked: UnpackResult =
        spawner.run(Worker::Unpack, &request, descriptors, limits, &mut |_| (), cancel.clone()).await?;
    let unpack = begin.elapsed();

    let ingested: TreeResult = spawner
        .run(Worker::Tree, &TreeRequest::Ingest { path }, directory()?, limits, &mut |_| (), cancel.clone())
        .await?;
    let ingest = begin.elapsed();
    let _: TreeResult = spawner
        .run(
            Worker::Tree,
            &TreeRequest::Remove { paths: vec![staging.relative(None)] },
            directory()?,
            limits,
            &mut |_| (),
            cancel.clone(),
        )
        .await?;
    let done = begin.elapsed();
    println!("{unpacked:?}\n{ingested:?}");
    println!(
        "prepare {prepared:.1?}, unpack {:.1?}, ingest {:.1?}, clean {:.1?}, all {done:.1?}",
        unpack - prepared,
        ingest - unpack,
        done - ingest
    );
    if let TreeResult::Ingested { digest, .. } = ingested
        && std::env::var_os("CASEMATE_VERIFY").is_some()
    {
        let begin = Instant::now();
        let verify = TreeRequest::Verify { layer: digest };
        let verified: TreeResult =
            spawner.run(Worker::Tree, &verify, directory()?, limits, &mut |_| (), cancel).await?;
        println!("{verified:?} in {:.1?}", begin.elapsed());
    }
    Ok(())
}
