//! Proxies as the request names them, in the forms that curl understands.

use casemate_worker::protocol::Proxies;
use reqwest::{NoProxy, Proxy, Url};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProxyError {
    // The value may hold a password: it is not told.
    #[error("{0} is no URL of a proxy, such as http://proxy.example:3128")]
    Malformed(&'static str),
    #[error(
        "{0} names a proxy of kind {1:?}; http, https, socks4, socks4a, socks5 and socks5h are understood"
    )]
    Kind(&'static str, String),
}

fn parse(name: &'static str, value: &str) -> Result<Url, ProxyError> {
    let value = value.trim();
    let value = if value.contains("://") { value.to_owned() } else { format!("http://{value}") };
    let url = Url::parse(&value).map_err(|_| ProxyError::Malformed(name))?;
    if !["http", "https", "socks4", "socks4a", "socks5", "socks5h"].contains(&url.scheme()) {
        return Err(ProxyError::Kind(name, url.scheme().to_owned()));
    }
    if url.has_host() { Ok(url) } else { Err(ProxyError::Malformed(name)) }
}

/// A list as curl takes it: separated by commas or blanks, names without regard to case, addresses of IPv6 in brackets
/// or without.
fn exceptions(list: &str) -> Option<NoProxy> {
    let words = list.split([',', ' ', '\t', '\n']).filter(|word| !word.is_empty());
    let words: Vec<String> =
        words.map(|word| word.trim_matches(['[', ']']).trim_end_matches('.').to_ascii_lowercase()).collect();
    NoProxy::from_string(&words.join(","))
}

type Make = fn(Url) -> reqwest::Result<Proxy>;

/// The proxies for a client; none where none is named.
pub fn proxies(proxies: &Proxies) -> Result<Vec<Proxy>, ProxyError> {
    let none = exceptions(&proxies.none);
    let kinds: [(_, _, Make); 2] = [
        ("https_proxy", &proxies.https, |url| Proxy::https(url)),
        ("http_proxy", &proxies.http, |url| Proxy::http(url)),
    ];
    let named = kinds.into_iter().filter(|(_, value, _)| !value.trim().is_empty());
    named
        .map(|(name, value, make)| {
            let proxy = make(parse(name, value)?).map_err(|_| ProxyError::Malformed(name))?;
            Ok(proxy.no_proxy(none.clone()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        let show = |value| parse("https_proxy", value).map(|url| url.to_string());
        assert_eq!(show("proxy.example:3128"), Ok("http://proxy.example:3128/".to_owned()));
        assert_eq!(
            show(" http://me:secret@proxy.example "),
            Ok("http://me:secret@proxy.example/".to_owned())
        );
        assert_eq!(show("socks5h://10.0.0.1"), Ok("socks5h://10.0.0.1".to_owned()));
        assert_eq!(show("ftp://me:secret@x"), Err(ProxyError::Kind("https_proxy", "ftp".to_owned())));
        for bad in ["http://", "http://[", "://", "me:secret@"] {
            let error = show(bad).expect_err(bad);
            assert!(!error.to_string().contains("secret"), "{error}");
        }
        let both = Proxies { https: "a:1".into(), http: "b:2".into(), none: "x, Y.example [::1]".into() };
        assert_eq!(proxies(&both).expect("good").len(), 2);
        assert!(proxies(&Proxies::default()).expect("good").is_empty());
    }
}
