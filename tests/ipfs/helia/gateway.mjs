// A process that runs a trustless gateway (specs.ipfs.tech/http-gateways/trustless-gateway) over a Helia node without
// peers: its port, then a path per line in, the CID of that file per line out; an empty line asks how many requests came.
import { createReadStream } from 'node:fs'
import { createServer } from 'node:http'
import { createInterface } from 'node:readline'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'

import { withBitswap } from '@helia/bitswap'
import { withLibp2pLight } from '@helia/libp2p'
import { unixfs } from '@helia/unixfs'
import { createVerifiedFetch } from '@helia/verified-fetch'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { createHeliaLight } from 'helia'
import { fixedSize } from 'ipfs-unixfs-importer/chunker'
import { balanced } from 'ipfs-unixfs-importer/layout'

const helia = withBitswap(withLibp2pLight(createHeliaLight(), {
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify() }
}))
await helia.start()
const files = unixfs(helia)
const verifiedFetch = await createVerifiedFetch(helia)
let requests = 0

// The port of the gateway is all that is added here: what is asked and answered is Helia's.
const server = createServer(async (request, response) => {
  requests += 1
  const gone = new AbortController()
  response.on('close', () => gone.abort())
  const { pathname, search } = new URL(request.url, 'http://gateway')
  const headers = new Headers(Object.entries(request.headers).map(([name, value]) => [name, String(value)]))
  try {
    const answer = await verifiedFetch(`ipfs://${pathname.slice('/ipfs/'.length)}${search}`, { headers, signal: gone.signal })
    response.writeHead(answer.status, Object.fromEntries(answer.headers))
    await pipeline(answer.body ? Readable.fromWeb(answer.body) : Readable.from([]), response)
  } catch {
    response.destroy()
  }
})

server.listen(0, '127.0.0.1', () => console.log(JSON.stringify(server.address().port)))
for await (const line of createInterface({ input: process.stdin })) {
  const path = JSON.parse(line)
  console.log(JSON.stringify(path === '' ? requests : String(await files.addByteStream(
    createReadStream(path, { highWaterMark: 1 << 20 }),
    {
      cidVersion: 1,
      rawLeaves: true,
      chunker: fixedSize({ chunkSize: 1 << 20 }),
      layout: balanced({ maxChildrenPerNode: 174 })
    }
  ))))
}
process.exit(0)
