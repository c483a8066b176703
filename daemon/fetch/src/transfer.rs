//! Fetching: mirrors in turn, resumption, limits, and the judging of redirects.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use casemate_worker::Events;
use casemate_worker::protocol::{
    Failure, FailureKind, FetchItem, FetchRequest, FetchResult, Fetched, Proxies,
};
use futures_util::StreamExt;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, RANGE};
use reqwest::{Client, NoProxy, Proxy, Response, StatusCode, redirect};

use crate::resolver::SystemResolver;

const CONNECT: Duration = Duration::from_secs(20);
/// THREATS.md, B: slower than this is given up.
const SLOWEST: u64 = 30;
const PATIENCE: Duration = Duration::from_secs(60);
/// Times that one mirror may break off before the next is asked.
const TRIES: u32 = 2;
const REDIRECTS: usize = 10;
/// Most bytes of what is told of all failures.
const REPORT: usize = 2_000;

/// Why one attempt failed.
enum Attempt {
    /// The same mirror may go on from where it broke off.
    Broken(String),
    /// This mirror is of no use.
    Useless { missing: bool, why: String },
    /// No mirror will help.
    Final(Failure),
}

struct Progress<'a> {
    events: &'a mut Events,
    done: Vec<u64>,
    total: u64,
    complete: u64,
}

impl Progress<'_> {
    fn set(&mut self, index: usize, bytes: u64) {
        self.done[index] = bytes;
        let items = self.done.len() as u64;
        self.events.progress(self.done.iter().sum(), self.total, self.complete, items);
    }
}

fn proxies(proxies: &Proxies) -> Result<Vec<Proxy>, Failure> {
    let none = NoProxy::from_string(&proxies.none);
    let make = |url: &str, kind: fn(&str) -> reqwest::Result<Proxy>| {
        kind(url)
            .map(|proxy| proxy.no_proxy(none.clone()))
            // The URL may hold a password: not even the error's own text is told.
            .map_err(|_| Failure::new(FailureKind::Network, "proxy", "https_proxy or http_proxy is no URL"))
    };
    let mut all = Vec::new();
    if !proxies.https.is_empty() {
        all.push(make(&proxies.https, |url| Proxy::https(url))?);
    }
    if !proxies.http.is_empty() {
        all.push(make(&proxies.http, |url| Proxy::http(url))?);
    }
    Ok(all)
}

fn client(
    request: &FetchRequest,
    tls: rustls::ClientConfig,
    resolver: SystemResolver,
    plain: bool,
) -> Result<Client, Failure> {
    let judge = redirect::Policy::custom(move |attempt| {
        if attempt.previous().len() > REDIRECTS {
            return attempt.error("more redirects than 10");
        }
        let secure = attempt.url().scheme() == "https";
        // From https nothing leads back to http, whatever the item allows.
        let was_secure = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
        if secure || (plain && !was_secure && attempt.url().scheme() == "http") {
            attempt.follow()
        } else {
            attempt.error("a redirect to something other than https")
        }
    });
    let mut builder = Client::builder()
        .tls_backend_preconfigured(tls)
        .dns_resolver(resolver)
        .no_proxy()
        .redirect(judge)
        .connect_timeout(CONNECT)
        .https_only(!plain)
        .referer(false)
        .user_agent(concat!("casemate/", env!("CARGO_PKG_VERSION")));
    for proxy in proxies(&request.proxies)? {
        builder = builder.proxy(proxy);
    }
    builder.build().map_err(|error| Failure::new(FailureKind::Network, "client", chain(&error)))
}

/// An error with its causes, without the URL, which may hold a password.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = source.source();
    }
    text
}

fn broken(error: reqwest::Error) -> Attempt {
    Attempt::Broken(chain(&error.without_url()))
}

/// A URL as it may be shown: without userinfo.
fn shown(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = authority.rsplit('@').next().unwrap_or(authority);
    format!("{scheme}://{host}{path}")
}

pub async fn fetch(
    request: &FetchRequest,
    tls: rustls::ClientConfig,
    resolver: SystemResolver,
    output: &File,
    events: &mut Events,
) -> Result<FetchResult, Failure> {
    let secure = client(request, tls.clone(), resolver.clone(), false)?;
    let plain = client(request, tls, resolver, true)?;
    let total = request.items.iter().map(|item| item.size.unwrap_or(0)).fold(0u64, u64::saturating_add);
    let progress = RefCell::new(Progress { events, done: vec![0; request.items.len()], total, complete: 0 });
    let transfers = request.items.iter().enumerate().map(|(index, item)| {
        let (progress, client) = (&progress, if item.plain_http { &plain } else { &secure });
        async move {
            let fetched = one(client, item, output, |bytes| progress.borrow_mut().set(index, bytes)).await?;
            progress.borrow_mut().complete += 1;
            Ok::<_, Failure>((index, fetched))
        }
    });
    let mut running =
        futures_util::stream::iter(transfers).buffer_unordered(usize::from(request.connections.clamp(1, 16)));
    let mut fetched: Vec<Option<Fetched>> = vec![None; request.items.len()];
    while let Some(next) = running.next().await {
        let (index, one) = next?;
        fetched[index] = Some(one);
    }
    Ok(FetchResult { items: fetched.into_iter().flatten().collect() })
}

async fn one(
    client: &Client,
    item: &FetchItem,
    output: &File,
    mut tell: impl FnMut(u64),
) -> Result<Fetched, Failure> {
    let mut have = item.resume;
    let mut report = String::new();
    let mut all_missing = true;
    for url in &item.urls {
        for _ in 0..TRIES {
            match attempt(client, item, url, output, &mut have, &mut tell).await {
                Ok(fetched) => return Ok(fetched),
                Err(Attempt::Final(failure)) => return Err(failure),
                Err(Attempt::Broken(why)) => {
                    all_missing = false;
                    note(&mut report, url, &why);
                }
                Err(Attempt::Useless { missing, why }) => {
                    all_missing &= missing;
                    note(&mut report, url, &why);
                    break;
                }
            }
        }
        // What one mirror sent need not be the beginning of what another has.
        have = 0;
    }
    let kind =
        if all_missing && !item.urls.is_empty() { FailureKind::NotFound } else { FailureKind::Network };
    let subject = item.urls.first().map(|url| shown(url)).unwrap_or_default();
    Err(Failure::new(kind, subject, format!("no mirror gave it: {report}")))
}

fn note(report: &mut String, url: &str, why: &str) {
    if report.len() < REPORT {
        report.push_str(&format!("[{}: {why}] ", shown(url)));
    }
}

async fn attempt(
    client: &Client,
    item: &FetchItem,
    url: &str,
    output: &File,
    have: &mut u64,
    tell: &mut impl FnMut(u64),
) -> Result<Fetched, Attempt> {
    let mut request = client.get(url).header(ACCEPT_ENCODING, "identity");
    if *have > 0 {
        request = request.header(RANGE, format!("bytes={have}-"));
    }
    let response = tokio::time::timeout(PATIENCE, request.send())
        .await
        .map_err(|_| Attempt::Broken(format!("no answer within {} s", PATIENCE.as_secs())))?
        .map_err(broken)?;
    judge(&response, item, have)?;
    let served = response.url().to_string();
    let most = item.size.unwrap_or(item.limit);
    let mut window = (Instant::now(), 0u64);
    let mut response = response;
    loop {
        let chunk = tokio::time::timeout(PATIENCE, response.chunk())
            .await
            .map_err(|_| Attempt::Broken(format!("nothing came for {} s", PATIENCE.as_secs())))?
            .map_err(broken)?;
        let Some(chunk) = chunk else { break };
        let end = have.saturating_add(chunk.len() as u64);
        if end > most {
            let why = match item.size {
                Some(size) => format!("the body is longer than the {size} bytes of the index"),
                None => format!("the body is longer than {most} bytes"),
            };
            return Err(Attempt::Useless { missing: false, why });
        }
        output
            .write_all_at(&chunk, item.offset.saturating_add(*have))
            .map_err(|error| Attempt::Final(Failure::io(shown(url), &error)))?;
        *have = end;
        tell(end);
        window.1 += chunk.len() as u64;
        if window.0.elapsed() >= PATIENCE {
            if window.1 < SLOWEST * PATIENCE.as_secs() {
                return Err(Attempt::Useless {
                    missing: false,
                    why: format!("slower than {SLOWEST} bytes a second"),
                });
            }
            window = (Instant::now(), 0);
        }
    }
    match item.size {
        Some(size) if *have != size => {
            Err(Attempt::Broken(format!("the body ended after {have} of {size} bytes")))
        }
        _ => Ok(Fetched { url: served, bytes: *have }),
    }
}

/// Judge status and headers; a server that does not resume begins anew.
fn judge(response: &Response, item: &FetchItem, have: &mut u64) -> Result<(), Attempt> {
    let useless = |why: String| Err(Attempt::Useless { missing: false, why });
    match response.status() {
        StatusCode::PARTIAL_CONTENT if *have > 0 => {
            let range = response
                .headers()
                .get(CONTENT_RANGE)
                .and_then(|value| value.to_str().ok())
                .unwrap_or_default();
            let begins = range
                .strip_prefix("bytes ")
                .and_then(|range| range.split('-').next())
                .and_then(|n| n.parse().ok());
            if begins != Some(*have) {
                *have = 0;
                return Err(Attempt::Broken(format!(
                    "asked to resume, it answered with the range {range:?}"
                )));
            }
        }
        StatusCode::OK => *have = 0,
        StatusCode::NOT_FOUND | StatusCode::GONE => {
            return Err(Attempt::Useless { missing: true, why: response.status().to_string() });
        }
        StatusCode::RANGE_NOT_SATISFIABLE if *have > 0 => {
            *have = 0;
            return Err(Attempt::Broken("it does not resume".to_owned()));
        }
        other => return useless(format!("it answered {other}")),
    }
    match (item.size, response.content_length()) {
        (Some(size), Some(length)) if have.saturating_add(length) != size => {
            useless(format!("it announces {} bytes, the index says {size}", have.saturating_add(length)))
        }
        (None, Some(length)) if length > item.limit => {
            useless(format!("it announces {length} bytes, more than the {} allowed", item.limit))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::shown;

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(shown("https://me:secret@mirror.example/x"), "https://mirror.example/x");
        assert_eq!(shown("https://mirror.example/a@b"), "https://mirror.example/a@b");
    }
}
