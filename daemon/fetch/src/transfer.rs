//! Items and their mirrors: each mirror gets two tries, then the next; what a server that cannot be reached costs is paid
//! once, not by each item.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::fs::File;
use std::time::Duration;

use casemate_worker::protocol::{Failure, FailureKind, FetchItem, FetchRequest, FetchResult, Fetched};
use futures_util::StreamExt;
use reqwest::{Client, Url, redirect};

use crate::address::{self, plain, shown};
use crate::attempt::{Attempt, Attempts, Reason, State, chain};
use crate::proxy;
use crate::resolver::{Configuration, SystemResolver};
use crate::{Limits, Progress};

/// Most bytes of what is told of all failures.
const REPORT: usize = 4_000;
/// Progress is told this often, also where nothing comes: the daemon takes silence for death.
const TICK: Duration = Duration::from_millis(250);

/// What of the system is needed to reach servers and to trust them.
pub struct Network {
    pub tls: rustls::ClientConfig,
    pub resolver: Configuration,
}

fn client(request: &FetchRequest, network: Network, limits: &Limits) -> Result<Client, Failure> {
    let failed = |subject: &str, message: String| Failure::new(FailureKind::Network, subject, message);
    let resolver =
        SystemResolver::new(network.resolver).map_err(|error| failed("resolver", plain(&error)))?;
    let mut builder = Client::builder()
        .tls_backend_preconfigured(network.tls)
        .dns_resolver(resolver)
        // Nothing from the environment; only what the request names.
        .no_proxy()
        .redirect(redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .connect_timeout(limits.connect)
        .http2_max_header_list_size(64 << 10)
        .user_agent(concat!("casemate/", env!("CARGO_PKG_VERSION")));
    for proxy in proxy::proxies(&request.proxies).map_err(|error| failed("proxy", error.to_string()))? {
        builder = builder.proxy(proxy);
    }
    builder.build().map_err(|error| failed("client", chain(error)))
}

/// A request that makes no sense is refused before anybody is asked.
fn check(request: &FetchRequest) -> Result<(), Failure> {
    for item in &request.items {
        let wrong = |message| {
            let subject = item.urls.first().map(|url| subject(url)).unwrap_or_default();
            Err(Failure::new(FailureKind::Request, subject, message))
        };
        let most = item.size.unwrap_or(item.limit);
        if item.urls.is_empty() {
            return wrong("it has no URL");
        }
        if item.resume > most {
            return wrong("more is there already than the file has");
        }
        if item.offset.checked_add(most).is_none_or(|end| i64::try_from(end).is_err()) {
            return wrong("it reaches beyond the end of all files");
        }
    }
    Ok(())
}

/// A URL as text, as it may be shown.
fn subject(url: &str) -> String {
    Url::parse(url).map_or_else(|_| "a URL that is none".to_owned(), |url| shown(&url))
}

/// Fetch all items. To be called inside of a runtime.
pub async fn fetch(
    request: &FetchRequest,
    network: Network,
    limits: &Limits,
    output: &File,
    tell: &mut dyn FnMut(Progress),
) -> Result<FetchResult, Failure> {
    check(request)?;
    let client = client(request, network, limits)?;
    let done: Vec<Cell<u64>> = request.items.iter().map(|item| Cell::new(item.resume)).collect();
    let complete = Cell::new(0);
    let unreachable = RefCell::new(HashSet::new());
    let known: Option<u64> = request.items.iter().map(|item| item.size).sum();
    let progress = || Progress {
        bytes: done.iter().map(Cell::get).sum(),
        bytes_total: known.unwrap_or(0),
        items: complete.get(),
        items_total: request.items.len() as u64,
    };
    let transfers = request.items.iter().zip(&done).enumerate().map(|(index, (item, done))| {
        let attempts = Attempts { client: &client, limits, item, output };
        let (unreachable, complete) = (&unreachable, &complete);
        async move {
            let fetched = one(&attempts, unreachable, &|bytes| done.set(bytes)).await?;
            complete.set(complete.get() + 1);
            Ok::<_, Failure>((index, fetched))
        }
    });
    let connections = usize::from(request.connections.clamp(1, 16));
    let mut running = std::pin::pin!(futures_util::stream::iter(transfers).buffer_unordered(connections));
    let mut ticker = tokio::time::interval(TICK);
    let mut fetched: Vec<Option<Fetched>> = vec![None; request.items.len()];
    loop {
        let tick = std::pin::pin!(ticker.tick());
        match futures_util::future::select(running.next(), tick).await {
            futures_util::future::Either::Left((Some(outcome), _)) => {
                let (index, one) = outcome?;
                fetched[index] = Some(one);
            }
            futures_util::future::Either::Left((None, _)) => break,
            futures_util::future::Either::Right(_) => tell(progress()),
        }
    }
    tell(progress());
    Ok(FetchResult { items: fetched.into_iter().flatten().collect() })
}

/// All that went wrong with one item.
#[derive(Default)]
struct Report {
    text: String,
    /// The reason of each mirror, where it was one for all.
    reasons: Vec<Reason>,
}

impl Report {
    fn add(&mut self, url: &str, reason: Reason, why: &str) {
        self.reasons.push(reason);
        if self.text.len() > REPORT {
            return;
        }
        if !self.text.is_empty() {
            self.text.push_str("; ");
        }
        self.text.push_str(url);
        self.text.push_str(": ");
        self.text.push_str(why);
        if self.text.len() > REPORT {
            self.text.push_str("; and more");
        }
    }

    fn into_failure(self, item: &FetchItem) -> Failure {
        let all = |reason| self.reasons.iter().all(|one| *one == reason);
        let (kind, what) = match () {
            () if all(Reason::Missing) => (FailureKind::NotFound, "no mirror has it"),
            () if all(Reason::TooLarge) => (FailureKind::Limit, "it is too large"),
            () => (FailureKind::Network, "no mirror gave it"),
        };
        let subject = item.urls.first().map(|url| subject(url)).unwrap_or_default();
        Failure::new(kind, subject, format!("{what} ({})", self.text))
    }
}

/// What a mirror is known by.
fn server(url: &Url) -> String {
    format!("{}:{}", url.host_str().unwrap_or_default(), url.port_or_known_default().unwrap_or_default())
}

async fn one(
    attempts: &Attempts<'_>,
    unreachable: &RefCell<HashSet<String>>,
    tell: &dyn Fn(u64),
) -> Result<Fetched, Failure> {
    let item = attempts.item;
    let mut report = Report::default();
    let mut urls = Vec::new();
    for (number, text) in (0..).zip(&item.urls) {
        match address::first(text, item.plain_http) {
            Ok(url) => urls.push((number, url)),
            Err(error) => report.add(&subject(text), Reason::Other, &error.to_string()),
        }
    }
    urls.sort_by_key(|(_, url)| unreachable.borrow().contains(&server(url)));
    // Without a size, what is there may be of another version.
    let mut state = State { have: if item.size.is_some() { item.resume } else { 0 }, tag: None };
    if let (Some((from, _)), true) = (urls.first(), item.size == Some(state.have) && state.have > 0) {
        return Ok(Fetched { from: *from, bytes: state.have });
    }
    for (from, url) in &urls {
        for attempt in 1..=attempts.limits.tries {
            match attempts.run(url, &mut state, tell).await {
                Ok(()) => return Ok(Fetched { from: *from, bytes: state.have }),
                Err(Attempt::Final(failure)) => return Err(failure),
                Err(Attempt::Broken { connect, why }) => {
                    report.add(&shown(url), Reason::Other, &why);
                    if connect {
                        unreachable.borrow_mut().insert(server(url));
                    }
                    if item.size.is_none() && state.tag.is_none() {
                        state.have = 0;
                    }
                    if attempt < attempts.limits.tries {
                        tokio::time::sleep(attempts.limits.pause).await;
                    }
                }
                Err(Attempt::Useless { reason, why }) => {
                    report.add(&shown(url), reason, &why);
                    break;
                }
            }
        }
        if item.size.is_none() {
            state = State { have: 0, tag: None };
        }
    }
    Err(report.into_failure(item))
}
